//! A bar per backend, as wide as its share.
use std::fmt::Write;

use svc_lab::load::Tally;
use svc_lab::topology::BACKENDS;

/// A bar of this width is half of all requests.
const WIDTH: u32 = 10;

pub(crate) fn draw(title: &str, tally: &Tally) -> String {
    let total = tally.answered() + tally.failed();
    let mut chart = format!("  {title}\n   ");
    for pod in &BACKENDS {
        let count = tally.backends.get(pod.name).copied().unwrap_or(0);
        // Writing to a string cannot fail.
        let _ = write!(chart, " {} {:<10} {count:<4}", pod.name, bar(count, total));
    }
    let _ = writeln!(chart, "{} failed", tally.failed());
    for (reason, count) in &tally.failures {
        let _ = writeln!(chart, "    {count} x {reason}");
    }
    chart
}

fn bar(count: u32, total: u32) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (count * 2 * WIDTH * 8).checked_div(total).unwrap_or(0).min(WIDTH * 8);
    format!("{}{}", "█".repeat((eighths / 8) as usize), EIGHTHS[(eighths % 8) as usize])
}

#[cfg(test)]
mod tests {
    use super::bar;

    #[test]
    fn a_quarter_is_half_a_bar() {
        assert_eq!(bar(50, 200), "█████");
        assert_eq!(bar(0, 200), "");
        assert_eq!(bar(0, 0), "");
        assert_eq!(bar(200, 200), "██████████");
    }
}
