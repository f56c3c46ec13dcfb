//! The metrics of the process, as every Prometheus client library has them.
use std::fs;

use super::Page;

/// Leaves out what cannot be read.
pub(super) fn write(page: &mut Page) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let system = fs::read_to_string("/proc/stat").unwrap_or_default();
    let (ticks, page_size) = (system_value(libc::_SC_CLK_TCK), system_value(libc::_SC_PAGESIZE));
    if let Some(usage) = Usage::parse(&stat, &system, ticks, page_size) {
        for (name, kind, help, value) in [
            ("cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", usage.cpu_seconds),
            ("resident_memory_bytes", "gauge", "Resident memory size in bytes.", usage.resident_bytes),
            ("virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", usage.virtual_bytes),
            (
                "start_time_seconds",
                "gauge",
                "Start time of the process since unix epoch in seconds.",
                usage.start_seconds,
            ),
        ] {
            let name = format!("process_{name}");
            page.family(&name, kind, help);
            page.sample(&name, "", value);
        }
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        page.family("process_open_fds", "gauge", "Number of open file descriptors.");
        page.sample("process_open_fds", "", entries.count());
    }
}

fn system_value(name: libc::c_int) -> f64 {
    // SAFETY: it takes a number.
    unsafe { libc::sysconf(name) as f64 }
}

#[derive(PartialEq, Debug)]
struct Usage {
    cpu_seconds: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    start_seconds: f64,
}

impl Usage {
    /// Of /proc/self/stat and /proc/stat (proc_pid_stat(5), proc_stat(5)); `ticks` a second.
    fn parse(stat: &str, system: &str, ticks: f64, page_size: f64) -> Option<Self> {
        // The program's name may have anything in it, but is in parentheses.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // The first of these is field 3.
        let number = |field: usize| -> Option<f64> { fields.get(field - 3)?.parse().ok() };
        let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        Some(Usage {
            cpu_seconds: (number(14)? + number(15)?) / ticks,
            resident_bytes: number(24)? * page_size,
            virtual_bytes: number(23)?,
            start_seconds: boot + number(22)? / ticks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_read_whatever_the_programs_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 3 0 2000 1048576 25 1 1 1";
        let usage = Usage::parse(stat, "cpu 1 2\nbtime 1000\n", 100.0, 4096.0);
        let expected =
            Usage { cpu_seconds: 2.0, resident_bytes: 102_400.0, virtual_bytes: 1_048_576.0, start_seconds: 1_020.0 };
        assert_eq!(usage, Some(expected));
    }
}
