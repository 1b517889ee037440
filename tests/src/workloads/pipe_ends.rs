//! Pipes whose ends are closed or in other tasks: end of file with data still inside, broken pipe, an end that only a
//! child has, both ends in different children.

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, errno_of};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: so that a write to a broken pipe returns.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let (no_writer, gone) = sys::pipe(0)?;
    sys::write(&gone, b"last words")?;
    drop(gone);
    let (gone, no_reader) = sys::pipe(0)?;
    drop(gone);
    let (up_reader, up_writer) = sys::pipe(0)?;
    let (side_reader, side_writer) = sys::pipe(0)?;
    sys::write(&side_writer, b"before ")?;
    let one = ctl.child("one", |ctl| {
        ctl.wait_as("one")?;
        sys::write(&side_writer, b"after")?;
        sys::write(&up_writer, b"from child").map(drop).map_err(Into::into)
    })?;
    let two = ctl.child("two", |ctl| {
        if ctl.wait_as("two")? {
            sys::read(&side_reader, 2)?;
        }
        let mut got = Vec::new();
        while got.len() < 12 {
            got.extend(sys::read(&side_reader, 100)?);
        }
        same("between two children", got, b"before after".to_vec())
    })?;
    ctl.await_ready("one")?;
    ctl.await_ready("two")?;
    drop((up_writer, side_reader, side_writer));

    if ctl.wait()? {
        sys::read(&no_writer, 1)?;
    }

    same("pipe without writer", sys::read(&no_writer, 100)?, b"last words".to_vec())?;
    same("its end", sys::read(&no_writer, 100)?, Vec::new())?;
    same("pipe without reader", errno_of(&sys::write(&no_reader, b"x")), libc::EPIPE)?;
    same("from the child", sys::read(&up_reader, 100)?, b"from child".to_vec())?;
    one.join()?;
    two.join()?;
    // Child two had a copy of the write end as well, so only now all writers are gone.
    same("end of the child's pipe", sys::read(&up_reader, 100)?, Vec::new())?;
    ensure(sys::readiness(&no_reader, libc::POLLOUT)? & libc::POLLERR != 0, "a pipe without reader is not broken")
}
