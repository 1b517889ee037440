//! Writing pages of the task's own memory to a file, skipping those that are all zero.
use crate::protocol::{BYTES_AT_ONCE, RANGES_AT_ONCE, RAW, WritePages, ZEROS_AT_ONCE, ZeroRun};
use crate::sys;

const PAGE: u64 = 4096;
/// One pwritev: large enough that its cost does not count.
const CHUNK: u64 = 8 << 20;
const EFBIG: i64 = -27;
const EFAULT: i64 = -14;
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

/// What is gathered for one pwritev.
struct Gathered {
    count: usize,
    bytes: u64,
}

/// Writes `gathered` vectors; on an error as much as was possible.
fn flush(call: &mut WritePages, gathered: &mut Gathered, limit: u64) -> i64 {
    let mut first = 0;
    while first < gathered.count {
        if call.offset.saturating_add(gathered.bytes) > limit {
            return EFBIG;
        }
        let vectors = &call.vector[first] as *const ZeroRun as u64;
        let count = (gathered.count - first) as u64;
        // SAFETY: a ZeroRun is laid out as struct iovec; a bad address makes the kernel answer EFAULT.
        let wrote =
            unsafe { sys::syscall(sys::PWRITEV, [call.fd as u64, vectors, count, call.offset, 0, 0]) };
        if wrote == EINTR {
            continue;
        }
        if wrote <= 0 {
            return if wrote == 0 { EIO } else { wrote };
        }
        let mut left = wrote as u64;
        call.offset += left;
        call.written += left;
        gathered.bytes -= left;
        while left > 0 && first < gathered.count {
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
    *gathered = Gathered { count: 0, bytes: 0 };
    0
}

/// Adds a run to the zero list, or lengthens its last; false if the list is full.
fn note_zero(call: &mut WritePages, address: u64) -> bool {
    let n = call.zeros as usize;
    if n > 0 && call.zero[n - 1].address + call.zero[n - 1].len == address {
        call.zero[n - 1].len += PAGE;
        return true;
    }
    if n == ZEROS_AT_ONCE {
        return false;
    }
    call.zero[n] = ZeroRun { address, len: PAGE };
    call.zeros += 1;
    true
}

/// The command. `next_range`/`next_offset` advance only past what is in the file or in the zero list.
pub fn write(call: &mut WritePages) -> i64 {
    let limit = file_limit();
    let mut gathered = Gathered { count: 0, bytes: 0 };
    let ranges = if call.ranges as usize > RANGES_AT_ONCE { RANGES_AT_ONCE } else { call.ranges as usize };
    let (mut range, mut done) = (call.next_range as usize, call.next_offset);
    let mut result = 0;
    while range < ranges && call.written + gathered.bytes < BYTES_AT_ONCE {
        let current = call.range[range];
        if done >= current.len {
            range += 1;
            done = 0;
            continue;
        }
        let address = current.address + done;
        let step = if current.flags & RAW != 0 {
            let rest = current.len - done;
            let room = CHUNK - gathered.bytes;
            if rest < room { rest } else { room }
        } else {
            // SAFETY: the guardian lists only pages that can be read; it falls back to reading from outside if the
            // task was killed by a fault here, which it sees as a SIGSEGV stop.
            if unsafe { is_zero(address) } {
                if !note_zero(call, address) {
                    break;
                }
                done += PAGE;
                continue;
            }
            PAGE
        };
        let n = gathered.count;
        if n > 0 && call.vector[n - 1].address + call.vector[n - 1].len == address {
            call.vector[n - 1].len += step;
        } else {
            call.vector[n] = ZeroRun { address, len: step };
            gathered.count += 1;
        }
        gathered.bytes += step;
        done += step;
        if gathered.bytes >= CHUNK || gathered.count == call.vector.len() {
            result = flush(call, &mut gathered, limit);
            if result != 0 {
                break;
            }
            (call.next_range, call.next_offset) = (range as u64, done);
        }
    }
    if result == 0 && gathered.count > 0 {
        result = flush(call, &mut gathered, limit);
    }
    if result == 0 {
        (call.next_range, call.next_offset) = (range as u64, done);
    }
    if result == EFAULT && call.written == 0 {
        return EFAULT;
    }
    result
}
