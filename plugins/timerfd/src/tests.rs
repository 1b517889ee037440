use crate::{
    Timers, dump,
    kernel::{self, Setting},
    records::stasis::timerfd::v1::Timer,
};
use stasis_plugin_api::{Descriptor, testing::Kit};
use std::{os::fd::OwnedFd, thread::sleep, time::Duration};

const MS: u64 = 1_000_000;
const CLOCKS: [i32; 5] = [
    libc::CLOCK_REALTIME,
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_REALTIME_ALARM,
    libc::CLOCK_BOOTTIME_ALARM,
];

/// A timer that was dumped, lay in the image for `away`, and was restored.
struct Journey {
    kit: Kit,
    number: i32,
}

impl Journey {
    fn of(timer: OwnedFd, away: Duration) -> Self {
        let mut kit = Kit::new();
        kit.plugin(Timers);
        let number = kit.hold(timer, Timers::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        sleep(away);
        kit.restore().unwrap();
        Self { kit, number }
    }
    fn timer(&self) -> OwnedFd {
        self.kit.fd(self.number).try_clone_to_owned().unwrap()
    }
    fn state(&self) -> Timer {
        dump::timer(self.timer()).unwrap()
    }
    fn record(&self) -> Timer {
        self.kit.record::<Timers>().unwrap()
    }
}

fn ticks(timer: &OwnedFd) -> Option<u64> {
    let mut count = 0u64;
    // SAFETY: reads 8 bytes into a u64.
    let n = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(timer), (&raw mut count).cast(), 8) };
    (n == 8).then_some(count)
}

#[test]
fn fdinfo_is_read() {
    let text = "pos:\t0\nclockid: 7\nticks: 3\nsettime flags: 03\nit_value: (1, 5)\nit_interval: (0, 250)\n";
    let expected =
        Timer { clock: 7, settime_flags: 3, ticks: 3, remaining: 1_000_000_005, interval: 250, moment: 0 };
    assert_eq!(dump::parse(text).unwrap(), expected);
    assert!(dump::parse("clockid: 1\n").unwrap_err().to_string().contains("it_value"));
    assert!(dump::parse(&text.replace("(1, 5)", "1 5")).unwrap_err().to_string().contains("it_value"));
}

/// A machine that stands still for a moment spoils a measurement, but not every time.
fn once_of_ten(mut holds: impl FnMut() -> bool, what: &str) {
    assert!((0..10).any(|_| holds()), "{what}");
}

#[test]
fn remaining_time_stands_still_in_the_image() {
    for clock in CLOCKS {
        let stands_still = || {
            let timer = kernel::create(clock).unwrap();
            kernel::set(&timer, 0, Setting { value: 500 * MS, interval: 70 * MS }).unwrap();
            let journey = Journey::of(timer, Duration::from_millis(60));
            let (before, after) = (journey.record(), journey.state());
            assert_eq!(Timer { remaining: 0, ..before }, Timer { remaining: 0, ..after });
            before.remaining - after.remaining < 50 * MS
        };
        once_of_ten(stands_still, &format!("clock {clock}: time went on in the image"));
    }
}

#[test]
fn absolute_timers_stay_absolute_and_the_wall_clock_goes_on() {
    let absolute = libc::TFD_TIMER_ABSTIME as u32;
    for clock in CLOCKS {
        let wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
        let flags = if wall { absolute | libc::TFD_TIMER_CANCEL_ON_SET as u32 } else { absolute };
        let left_of_400 = || {
            let timer = kernel::create(clock).unwrap();
            let end = kernel::now(clock).unwrap() + 400 * MS;
            kernel::set(&timer, flags, Setting { value: end, interval: 0 }).unwrap();
            let journey = Journey::of(timer, Duration::from_millis(100));
            assert_eq!(journey.state().settime_flags, flags);
            kernel::get(&journey.timer()).unwrap().value
        };
        match wall {
            true => assert!(left_of_400() <= 300 * MS, "clock {clock}: the wall clock stood still"),
            false => {
                once_of_ten(
                    || left_of_400() > 320 * MS,
                    &format!("clock {clock}: time went on in the image"),
                );
            }
        }
    }
}

#[test]
fn a_wall_clock_moment_that_passed_expires_at_once() {
    let timer = kernel::create(libc::CLOCK_REALTIME).unwrap();
    let value = kernel::now(libc::CLOCK_REALTIME).unwrap() + 30 * MS;
    kernel::set(&timer, libc::TFD_TIMER_ABSTIME as u32, Setting { value, interval: 0 }).unwrap();
    let journey = Journey::of(timer, Duration::from_millis(50));
    assert_eq!(ticks(&journey.timer()), Some(1));
}

#[test]
fn unread_expirations_are_kept() {
    for clock in CLOCKS {
        let timer = kernel::create(clock).unwrap();
        kernel::set(&timer, 0, Setting { value: MS, interval: 0 }).unwrap();
        sleep(Duration::from_millis(5));
        let journey = Journey::of(timer, Duration::ZERO);
        assert_eq!(ticks(&journey.timer()), Some(1));
        assert_eq!(ticks(&journey.timer()), None, "a one-shot timer does not start again");
    }
}

#[test]
fn a_periodic_timer_keeps_count_and_phase() {
    let timer = kernel::create(libc::CLOCK_MONOTONIC).unwrap();
    kernel::set(&timer, 0, Setting { value: 10 * MS, interval: 10_000 * MS }).unwrap();
    sleep(Duration::from_millis(30));
    let journey = Journey::of(timer, Duration::from_millis(20));
    let record = journey.record();
    assert_eq!(record.ticks, 1);
    assert!((9_900 * MS..9_990 * MS).contains(&record.remaining), "{record:?}");
    assert_eq!(ticks(&journey.timer()), Some(1));
}

#[test]
fn a_short_interval_loses_nothing() {
    let timer = kernel::create(libc::CLOCK_MONOTONIC).unwrap();
    kernel::set(&timer, 0, Setting { value: MS, interval: MS }).unwrap();
    sleep(Duration::from_millis(20));
    let journey = Journey::of(timer, Duration::ZERO);
    assert!(journey.record().ticks >= 19);
    assert!(ticks(&journey.timer()).unwrap() >= journey.record().ticks);
}

#[test]
fn a_disarmed_timer_stays_so() {
    let timer = kernel::create(libc::CLOCK_MONOTONIC).unwrap();
    kernel::set(&timer, 0, Setting { value: 0, interval: MS }).unwrap();
    let journey = Journey::of(timer, Duration::from_millis(3));
    assert_eq!((journey.record().remaining, ticks(&journey.timer())), (0, None));
}
