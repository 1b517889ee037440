//! The same work for many items, on all CPUs, with the results in order.

use std::{
    num::NonZeroUsize,
    panic::resume_unwind,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Below this many items threads cost more than they bring.
const MINIMUM: usize = 4;

/// Applies `work` to every item. The first error by position wins.
pub fn map<T: Sync, R: Send, E: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(items.len());
    if items.len() < MINIMUM || threads < 2 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut done = thread::scope(|scope| {
        let workers: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut done = run();
        for worker in workers {
            // A panic of the work is a panic of the caller, as without threads.
            done.append(&mut worker.join().unwrap_or_else(|payload| resume_unwind(payload)));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_and_reports_the_first_error() {
        let items: Vec<u32> = (0..1000).collect();
        assert_eq!(
            map(&items, |n| Ok::<_, ()>(n * 2)).unwrap(),
            items.iter().map(|n| n * 2).collect::<Vec<_>>()
        );
        let failing = |n: &u32| if n % 10 == 7 { Err(*n) } else { Ok(()) };
        assert_eq!(map(&items, failing).unwrap_err(), 7);
    }
}
