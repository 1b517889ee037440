//! Writing pages of the task's own memory to a file, skipping those that are all zero.
use crate::protocol::{BYTES_AT_ONCE, RANGES_AT_ONCE, RAW, WritePages, ZEROS_AT_ONCE, ZeroRun};
use crate::sys;

const PAGE: u64 = 4096;
/// One pwritev: large enough that its cost does not count.
const CHUNK: u64 = 8 << 20;
const EFBIG: i64 = -27;
const EIO: i64 = -5;
const EINTR: i64 = -4;
const RLIMIT_FSIZE: u64 = 1;

/// True if the page holds nothing but zeros.
///
/// # Safety
/// `page` must be readable, 4096 bytes, aligned.
unsafe fn is_zero(page: u64) -> bool {
    let words = page as *const [u64; 8];
    let mut i = 0;
    while i < 64 {
        // SAFETY: 64 groups of 8 words are the page the caller vouches for. Volatile: the memory is not Rust's.
        let group = unsafe { words.add(i).read_volatile() };
        if group[0] | group[1] | group[2] | group[3] | group[4] | group[5] | group[6] | group[7] != 0 {
            return false;
        }
        i += 1;
    }
    true
}

/// A write beyond RLIMIT_FSIZE would leave SIGXFSZ pending in the task, so the limit is asked first.
fn file_limit() -> u64 {
    let mut limit = [0u64; 2];
    // SAFETY: struct rlimit is two words.
    match unsafe { sys::syscall(sys::GETRLIMIT, [RLIMIT_FSIZE, &raw mut limit as u64, 0, 0, 0, 0]) } {
        0 => limit[0],
        _ => 0,
    }
}

/// Where the work is; the call's own fields say only what is certain, so that they hold even if it is broken off.
struct Work {
    /// Vectors gathered for one pwritev.
    count: usize,
    /// Their bytes.
    bytes: u64,
    /// Where in the file they go.
    offset: u64,
    /// Bytes written.
    written: u64,
    /// Zero runs noted.
    zeros: usize,
}

/// Writes what is gathered.
fn flush(call: &mut WritePages, work: &mut Work, limit: u64) -> i64 {
    let mut first = 0;
    while first < work.count {
        if work.offset.saturating_add(work.bytes) > limit {
            return EFBIG;
        }
        let vectors = &raw const call.vector[first] as u64;
        let count = (work.count - first) as u64;
        // SAFETY: a ZeroRun is laid out as struct iovec; a bad address makes the kernel answer EFAULT.
        let wrote =
            unsafe { sys::syscall(sys::PWRITEV, [call.fd as u64, vectors, count, work.offset, 0, 0]) };
        if wrote == EINTR {
            continue;
        }
        if wrote <= 0 {
            return if wrote == 0 { EIO } else { wrote };
        }
        let mut left = wrote as u64;
        work.offset += left;
        work.written += left;
        work.bytes -= left;
        while left > 0 && first < work.count {
            let vector = &mut call.vector[first];
            let part = if left < vector.len { left } else { vector.len };
            vector.address += part;
            vector.len -= part;
            left -= part;
            if vector.len == 0 {
                first += 1;
            }
        }
    }
    (work.count, work.bytes) = (0, 0);
    0
}

/// Adds a page to the zero runs; false if there is no room.
fn note_zero(call: &mut WritePages, work: &mut Work, address: u64) -> bool {
    let n = work.zeros;
    if n > 0 && call.zero[n - 1].address + call.zero[n - 1].len == address {
        call.zero[n - 1].len += PAGE;
        return true;
    }
    if n == ZEROS_AT_ONCE {
        return false;
    }
    call.zero[n] = ZeroRun { address, len: PAGE };
    work.zeros += 1;
    true
}

/// Adds bytes to what is gathered.
fn gather(call: &mut WritePages, work: &mut Work, address: u64, len: u64) {
    let n = work.count;
    if n > 0 && call.vector[n - 1].address + call.vector[n - 1].len == address {
        call.vector[n - 1].len += len;
    } else {
        call.vector[n] = ZeroRun { address, len };
        work.count += 1;
    }
    work.bytes += len;
}

/// The command.
pub fn write(call: &mut WritePages) -> i64 {
    let limit = file_limit();
    let mut work = Work { count: 0, bytes: 0, offset: call.offset, written: 0, zeros: 0 };
    let ranges = if call.ranges as usize > RANGES_AT_ONCE { RANGES_AT_ONCE } else { call.ranges as usize };
    let (mut range, mut done) = (call.next_range as usize, call.next_offset);
    while range < ranges && work.written + work.bytes < BYTES_AT_ONCE {
        let current = call.range[range];
        if done >= current.len {
            range += 1;
            done = 0;
            continue;
        }
        let address = current.address + done;
        let mut step = PAGE;
        if current.flags & RAW != 0 {
            let (rest, room) = (current.len - done, CHUNK - work.bytes);
            step = if rest < room { rest } else { room };
        // SAFETY: the guardian lists only pages that can be read. If the page went away (a truncated file), the fault
        // stops this thread, and what the call's fields say is still right.
        } else if unsafe { is_zero(address) } {
            // Every page has its place in the file, so a zero one leaves a hole; what stands before it goes first.
            let result = flush(call, &mut work, limit);
            if result != 0 {
                return result;
            }
            commit(call, &work, range, done);
            if !note_zero(call, &mut work, address) {
                break;
            }
            work.offset += PAGE;
            work.written += PAGE;
            done += PAGE;
            continue;
        }
        gather(call, &mut work, address, step);
        done += step;
        if work.bytes >= CHUNK || work.count == call.vector.len() {
            let result = flush(call, &mut work, limit);
            if result != 0 {
                return result;
            }
            commit(call, &work, range, done);
        }
    }
    let result = flush(call, &mut work, limit);
    if result == 0 {
        commit(call, &work, range, done);
    }
    result
}

/// All up to here is in the file or in the zero runs.
fn commit(call: &mut WritePages, work: &Work, range: usize, done: u64) {
    call.written = work.written;
    call.zeros = work.zeros as u64;
    call.next_range = range as u64;
    call.next_offset = done;
}
