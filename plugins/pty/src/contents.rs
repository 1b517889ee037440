//! What is in a terminal's buffers (drivers/tty/n_tty.c, drivers/tty/pty.c). It can only be read by taking it out, so it is
//! taken in `commit` and put back at once, in the same hook: a dump that fails later finds it where it was.
//!
//! Input is typed again under neutral settings: canonical, no echo, no signals, with bytes that mean something quoted by
//! the literal-next character. The kernel handles what a master writes in a worker; that it has done so is seen by a stop
//! character typed after it, which a master in packet mode is told of.

use crate::{
    ioctl,
    record::stasis::pty::v1::{Contents, Flow, Line, Termios},
};
use stasis_plugin_api::{HookError, Host, Result};
use std::{
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// N_TTY_BUF_SIZE (drivers/tty/n_tty.c), less one for the stop character.
pub(crate) const MOST_INPUT: usize = 4094;
/// The line discipline's buffer and the port's limit (drivers/tty/pty.c), with room for the kernel's rounding.
const MOST_OUTPUT: usize = 32 << 10;
/// How long the kernel's worker may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Far less than the port's limit, so that no write ever has to wait.
const PIECE: usize = 256;

const END_OF_FILE: u8 = 4;
const LITERAL_NEXT: u8 = 0x16;
const START: u8 = 0x11;
const STOP: u8 = 0x13;
const SPECIAL: [u8; 5] = [b'\n', END_OF_FILE, LITERAL_NEXT, START, STOP];

/// Name of an object's blob.
fn blob(object: u32) -> String {
    format!("terminal-{object}")
}

impl Termios {
    pub(crate) fn is_canonical(&self) -> bool {
        self.lflag & (libc::ICANON | libc::EXTPROC) == libc::ICANON
    }

    /// The same with nothing done to what is read and written. `canonical` for typing, else for taking out.
    fn neutral(&self, canonical: bool) -> Self {
        let mut cc = vec![0; self.cc.len()];
        let mut set = |index: usize, byte: u8| {
            if let Some(place) = cc.get_mut(index) {
                *place = byte;
            }
        };
        if canonical {
            set(libc::VEOF, END_OF_FILE);
            set(libc::VLNEXT, LITERAL_NEXT);
            set(libc::VSTART, START);
            set(libc::VSTOP, STOP);
            return Self {
                iflag: libc::IXON,
                oflag: 0,
                lflag: libc::ICANON | libc::IEXTEN,
                cc,
                ..self.clone()
            };
        }
        set(libc::VMIN, 1);
        Self { iflag: 0, oflag: 0, lflag: 0, cc, ..self.clone() }
    }
}

impl Contents {
    pub(crate) fn is_empty(&self) -> bool {
        self.output.is_empty()
            && self.lines.is_empty()
            && self.partial.is_empty()
            && self.flow() == Flow::Running
    }

    /// Characters that the line discipline keeps for the input.
    fn input(&self) -> usize {
        let lines = self.lines.iter().map(|line| line.data.len() + usize::from(line.eof));
        lines.sum::<usize>() + self.partial.len()
    }

    fn check(&self) -> Result<()> {
        if self.input() > MOST_INPUT || self.output.len() > MOST_OUTPUT {
            return Err(HookError::invalid("the image has more than fits into a terminal"));
        }
        Ok(())
    }
}

/// Writes the contents of a terminal into the image.
pub(crate) fn save(host: &Host<'_>, object: u32, contents: &Contents) -> Result<()> {
    let bytes = prost::Message::encode_to_vec(contents);
    let written = host.blob_writer(&blob(object)).write_all(&bytes);
    written.map_err(|error| HookError::failed("writing the contents of a terminal", error))
}

/// Reads them again; nothing if there were none.
pub(crate) fn load(host: &Host<'_>, object: u32) -> Result<Contents> {
    let mut bytes = Vec::new();
    // Of hostile images, too much is malformed.
    let limit = 2 * (MOST_INPUT * 4 + MOST_OUTPUT) as u64;
    host.blob_reader(&blob(object))
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| HookError::failed("reading the contents of a terminal", error))?;
    let contents: Contents = prost::Message::decode(bytes.as_slice())
        .map_err(|_| HookError::invalid("the image's contents of a terminal are malformed"))?;
    contents.check()?;
    Ok(contents)
}

/// A slave of our own, whatever the tree has open.
pub(crate) fn open_slave(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let locked = ioctl::TIOCGPTLCK.get(master)?;
    ioctl::TIOCSPTLCK.call(master, &mut 0)?;
    let slave = ioctl::open_peer(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC);
    ioctl::TIOCSPTLCK.call(master, &mut { locked })?;
    slave
}

/// Copies what is in the buffers of a terminal that nobody uses meanwhile.
pub(crate) fn copy(master: BorrowedFd<'_>) -> Result<Contents> {
    let slave = open_slave(master)?;
    let slave = slave.as_fd();
    let termios = ioctl::termios(master)?;
    let packet = ioctl::TIOCGPKT.get(master)?;
    ioctl::TIOCPKT.call(master, &mut 0)?;
    let mut contents = Contents::default();
    let taken = take(master, slave, &termios, &mut contents);
    // What was taken goes back even if there was an error.
    let put = put(master, Some(slave), &termios, &contents);
    ioctl::TIOCPKT.call(master, &mut { packet })?;
    taken.and(put)?;
    match contents.input() {
        0..=MOST_INPUT => Ok(contents),
        _ => Err(HookError::invalid("more input than a line discipline holds")),
    }
}

/// Takes everything out. Leaves settings of its own and the output running.
fn take(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios,
    contents: &mut Contents,
) -> Result<()> {
    let mut buffer = vec![0; 2 * MOST_INPUT];
    take_output(master, &mut contents.output)?;
    // Nothing is in the way of output now but a stop.
    let writable = || Ok::<_, HookError>(ioctl::poll(slave, libc::POLLOUT)? & libc::POLLOUT != 0);
    if !writable()? {
        ioctl::flow(slave, libc::TCOON)?;
        let flow = if writable()? { Flow::Suspended } else { Flow::Stopped };
        contents.set_flow(flow);
        // TCOON has no effect on a stop by character, but after TCOOFF it starts whatever is stopped.
        ioctl::flow(slave, libc::TCOOFF)?;
        ioctl::flow(slave, libc::TCOON)?;
        // Echoes that were held up come with the next output.
        ioctl::write(slave, &[])?;
        take_output(master, &mut contents.output)?;
    }
    let readable = || Ok::<_, HookError>(ioctl::poll(slave, libc::POLLIN)? & libc::POLLIN != 0);
    while termios.is_canonical() && readable()? && contents.input() <= 2 * MOST_INPUT {
        let n = ioctl::read(slave, &mut buffer)?;
        let data = buffer[..n].to_vec();
        contents.lines.push(Line { eof: data.last() != Some(&b'\n'), data });
    }
    // Without lines, a line that is being typed shows.
    ioctl::set_termios(master, &termios.neutral(false))?;
    while readable()? && contents.input() <= 2 * MOST_INPUT {
        match ioctl::read(slave, &mut buffer)? {
            0 => break,
            n => contents.partial.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(())
}

fn take_output(master: BorrowedFd<'_>, output: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; 4096];
    while ioctl::poll(master, libc::POLLIN)? & libc::POLLIN != 0 && output.len() < MOST_OUTPUT {
        match ioctl::read(master, &mut buffer)? {
            0 => break,
            n => output.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(())
}

/// Fills the empty buffers of a terminal that nobody uses meanwhile, and leaves it with these settings. The slave is needed
/// for output only. Packet mode is off before and after.
pub(crate) fn put(
    master: BorrowedFd<'_>,
    slave: Option<BorrowedFd<'_>>,
    termios: &Termios,
    contents: &Contents,
) -> Result<()> {
    if contents.is_empty() {
        return ioctl::set_termios(master, termios);
    }
    ioctl::set_termios(master, &termios.neutral(true))?;
    if let Some(slave) = slave {
        write_output(slave, &contents.output)?;
    }
    ioctl::TIOCPKT.call(master, &mut 1)?;
    let mut piece = Vec::with_capacity(PIECE + 2);
    for unit in units(contents) {
        piece.extend(unit);
        if piece.len() >= PIECE {
            type_in(master, &piece)?;
            piece.clear();
        }
    }
    type_in(master, &piece)?;
    if contents.flow() == Flow::Stopped {
        mark(master, STOP)?;
    }
    ioctl::TIOCPKT.call(master, &mut 0)?;
    ioctl::set_termios(master, termios)?;
    match slave {
        Some(slave) if contents.flow() == Flow::Suspended => ioctl::flow(slave, libc::TCOOFF),
        _ => Ok(()),
    }
}

/// What to type, in units that belong together.
fn units(contents: &Contents) -> impl Iterator<Item = Vec<u8>> {
    let literal = |byte: u8| match SPECIAL.contains(&byte) {
        true => vec![LITERAL_NEXT, byte],
        false => vec![byte],
    };
    let line = move |line: &Line| {
        let (data, end) = match line.data.split_last() {
            Some((b'\n', rest)) if !line.eof => (rest, b'\n'),
            _ => (line.data.as_slice(), END_OF_FILE),
        };
        let mut units: Vec<Vec<u8>> = data.iter().copied().map(literal).collect();
        units.push(vec![end]);
        units
    };
    contents.lines.iter().flat_map(line).chain(contents.partial.iter().copied().map(literal))
}

/// Types bytes and waits until the kernel has handled them.
fn type_in(master: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    write_all(master, bytes)?;
    mark(master, STOP)?;
    mark(master, START)
}

/// Types a flow control character and waits until the master is told of it.
fn mark(master: BorrowedFd<'_>, character: u8) -> Result<()> {
    write_all(master, &[character])?;
    if !wait_until(|| Ok(ioctl::poll(master, libc::POLLPRI)? & libc::POLLPRI != 0))? {
        return Err(HookError::invalid("the terminal does not take its input"));
    }
    ioctl::read(master, &mut [0]).map(drop)
}

fn write_all(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    match ioctl::write(fd, bytes)? {
        n if n == bytes.len() => Ok(()),
        n => Err(HookError::invalid(format!("the terminal took {n} of {} bytes", bytes.len()))),
    }
}

/// The slave must not block. Small pieces fill the port's buffers best, and one last piece may go beyond their limit: so
/// as much fits as did, however it was written.
fn write_output(slave: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    const LAST: usize = 1792;
    while !bytes.is_empty() {
        let piece = if bytes.len() > LAST { PIECE } else { bytes.len() };
        let mut n = 0;
        // Until the kernel's worker has made room.
        let written = wait_until(|| match ioctl::write(slave, &bytes[..piece]) {
            Err(error) if error.errno == libc::EAGAIN => Ok(false),
            result => result.map(|written| n = written).map(|()| true),
        })?;
        if !written {
            return Err(HookError::invalid("the terminal does not take its output"));
        }
        bytes = &bytes[n.min(bytes.len())..];
    }
    Ok(())
}

/// Asks again and again, since the kernel's worker does not wake a poll(2) for all that it does. Gives whether it came.
fn wait_until(mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    let mut attempts = 0;
    while !done()? {
        if start.elapsed() > PATIENCE {
            return Ok(false);
        }
        attempts += 1;
        match attempts {
            0..100 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::tests::any_terminal;

    /// Everything that can be in a terminal, copied twice: the copy leaves all in place.
    fn unchanged(prepare: impl Fn(&OwnedFd, BorrowedFd<'_>)) -> Option<Contents> {
        let (master, _) = any_terminal()?;
        ioctl::TIOCSPTLCK.call(master.as_fd(), &mut 0).unwrap();
        let slave = open_slave(master.as_fd()).unwrap();
        prepare(&master, slave.as_fd());
        std::thread::sleep(std::time::Duration::from_millis(50));
        let termios = ioctl::termios(master.as_fd()).unwrap();
        let first = copy(master.as_fd()).unwrap();
        assert_eq!(copy(master.as_fd()).unwrap(), first);
        assert_eq!(ioctl::termios(master.as_fd()).unwrap(), termios);
        Some(first)
    }

    fn say(master: &OwnedFd, bytes: &[u8]) {
        assert_eq!(ioctl::write(master.as_fd(), bytes).unwrap(), bytes.len());
    }

    #[test]
    fn lines_and_the_one_being_typed() {
        let typed = b"one\n\x04two\x04li\x16\x04te\x16\nral\nhal\xff\x16\x13f";
        let Some(contents) = unchanged(|master, _| say(master, typed)) else { return };
        let line = |data: &[u8], eof| Line { data: data.to_vec(), eof };
        let lines =
            [line(b"one\n", false), line(b"", true), line(b"two", true), line(b"li\x04te\nral\n", false)];
        assert_eq!(contents.lines, lines);
        assert_eq!(contents.partial, b"hal\xff\x13f");
        // The echo.
        assert!(contents.output.starts_with(b"one\r\n"), "{:?}", contents.output);
    }

    #[test]
    fn raw_input_of_every_byte() {
        let all: Vec<u8> = (0..=255).cycle().take(MOST_INPUT).collect();
        let Some(contents) = unchanged(|master, slave| {
            let termios = ioctl::termios(slave).unwrap().neutral(false);
            ioctl::set_termios(slave, &termios).unwrap();
            all.chunks(500).for_each(|chunk| say(master, chunk));
        }) else {
            return;
        };
        assert_eq!(contents.partial, all);
        assert!(contents.lines.is_empty() && contents.output.is_empty());
    }

    #[test]
    fn as_much_output_as_fits() {
        let text: Vec<u8> = (0..40_000_u32).map(|n| (n % 251) as u8).collect();
        let Some(contents) = unchanged(|_, slave| {
            let termios = ioctl::termios(slave).unwrap();
            ioctl::set_termios(slave, &Termios { oflag: 0, ..termios }).unwrap();
            let mut rest = text.as_slice();
            while let Ok(n) = ioctl::write(slave, &rest[..rest.len().min(300)]) {
                rest = &rest[n..];
            }
        }) else {
            return;
        };
        assert!(contents.output.len() > 4096, "{}", contents.output.len());
        assert_eq!(contents.output, text[..contents.output.len()]);
    }

    #[test]
    fn stopped_output() {
        let Some(contents) = unchanged(|master, slave| {
            say(master, b"x\x13");
            std::thread::sleep(std::time::Duration::from_millis(20));
            let _ = ioctl::write(slave, b"y");
        }) else {
            return;
        };
        assert_eq!(contents.flow(), Flow::Stopped);
        let contents = unchanged(|_, slave| ioctl::flow(slave, libc::TCOOFF).unwrap()).unwrap();
        assert_eq!(contents.flow(), Flow::Suspended);
    }

    #[test]
    fn nothing_is_empty() {
        let Some(contents) = unchanged(|_, _| {}) else { return };
        assert!(contents.is_empty());
    }
}
