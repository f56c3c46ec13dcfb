//! `/metrics` in Prometheus' text format, and what else kube-proxy serves on that port.
use std::fmt::{Display, Write as _};
use std::time::UNIX_EPOCH;

use hyper::StatusCode;

use crate::dataplane::ReadCounters;
use crate::serve::Answer;
use crate::status::{BUCKETS, Histogram, Status};

/// What svc calls its own way, where kube-proxy has iptables, ipvs or nftables.
pub const PROXY_MODE: &str = "ebpf";

/// Kube-proxy's paths on its metrics port. `configz` is what the last of them says.
pub fn answer(path: &str, status: &Status, counters: Option<&ReadCounters>, configz: &str) -> Option<Answer> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let (content_type, body) = match path {
        "/metrics" => ("text/plain; version=0.0.4; charset=utf-8", text(status, counters)),
        "/proxyMode" => (PLAIN, PROXY_MODE.to_owned()),
        // That the process answers; the health of its work is on a port of its own.
        "/healthz" => (PLAIN, "ok".to_owned()),
        "/configz" => ("application/json", configz.to_owned()),
        _ => return None,
    };
    Some(Answer { status: StatusCode::OK, content_type, body })
}

fn text(status: &Status, counters: Option<&ReadCounters>) -> String {
    let progress = status.progress();
    let mut page = Page::default();
    page.family("svc_source_connected", "gauge", "Whether the source of Services can be reached.");
    page.sample("svc_source_connected", "", u8::from(status.connected()));
    page.family("svc_node_eligible", "gauge", "Whether load balancers may send traffic to this node.");
    page.sample("svc_node_eligible", "", u8::from(status.node_eligible()));

    let help = "Time to plan changes and write them to the kernel.";
    page.histogram("svc_sync_duration_seconds", help, &progress.syncs);
    page.family("svc_sync_operations_total", "counter", "Map entries written or deleted.");
    page.sample("svc_sync_operations_total", "", progress.operations);
    page.family("svc_sync_errors_total", "counter", "Syncs that the kernel refused.");
    page.sample("svc_sync_errors_total", "", status.failures());
    let repairs = status.repairs();
    let help = "Time to read the kernel's maps back and repair them.";
    page.histogram("svc_resync_duration_seconds", help, &repairs.resyncs);
    page.family("svc_repairs_total", "counter", "Map entries and links that somebody else changed, repaired.");
    for (map, count) in &repairs.repaired {
        page.sample("svc_repairs_total", &format!("map=\"{map}\""), count);
    }
    if let Some((time, sync)) = progress.last {
        let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        page.family("svc_sync_last_timestamp_seconds", "gauge", "When the kernel last was up to date.");
        page.sample("svc_sync_last_timestamp_seconds", "", seconds);
        for (name, help, value) in [
            ("svc_services", "Services known.", sync.services),
            ("svc_frontends", "Frontends in the kernel.", sync.frontends),
            ("svc_backends", "Backends that a set in the kernel holds.", sync.backends),
        ] {
            page.family(name, "gauge", help);
            page.sample(name, "", value);
        }
    }
    if let Some(counters) = counters.map(|read| read()) {
        page.family("svc_packets_total", "counter", "Packets and sockets by what became of them.");
        for (reason, counter) in &counters {
            page.sample("svc_packets_total", &format!("reason=\"{}\"", reason.label()), counter.packets);
        }
        page.family("svc_bytes_total", "counter", "Bytes by what became of them.");
        for (reason, counter) in &counters {
            page.sample("svc_bytes_total", &format!("reason=\"{}\"", reason.label()), counter.bytes);
        }
    }
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for (bound, count) in BUCKETS.iter().zip(histogram.buckets) {
            self.sample(&bucket, &format!("le=\"{bound}\""), count);
        }
        self.sample(&bucket, "le=\"+Inf\"", histogram.count);
        self.sample(&format!("{name}_sum"), "", histogram.total.as_secs_f64());
        self.sample(&format!("{name}_count"), "", histogram.count);
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = if labels.is_empty() {
            writeln!(self.text, "{name} {value}")
        } else {
            writeln!(self.text, "{name}{{{labels}}} {value}")
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use svc_common::Reason;
    use svc_common::map::Counter;

    use super::*;
    use crate::status::Sync;

    #[test]
    fn every_sample_belongs_to_a_family_that_is_announced_before_it() {
        let status = Status::default();
        status.synced(Sync { took: Duration::from_millis(2), operations: 3, services: 1, frontends: 2, backends: 4 });
        let read = || Reason::ALL.iter().map(|reason| (*reason, Counter { packets: 5, bytes: 6 })).collect();
        let page = answer("/metrics", &status, Some(&read), "").unwrap().body;
        let mut family = "";
        for line in page.lines() {
            if let Some(announced) = line.strip_prefix("# TYPE ") {
                family = announced.split(' ').next().unwrap();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} under {family}");
            }
        }
        for sample in [
            "svc_backends 4",
            "svc_sync_duration_seconds_bucket{le=\"0.001\"} 0",
            "svc_sync_duration_seconds_bucket{le=\"0.003\"} 1",
            "svc_packets_total{reason=\"flow_hit\"} 5",
            "svc_bytes_total{reason=\"no_backend\"} 6",
        ] {
            assert!(page.lines().any(|line| line == sample), "{sample} in\n{page}");
        }
    }

    #[test]
    fn the_other_paths_are_kube_proxys() {
        let body = |path| answer(path, &Status::default(), None, "{}").map(|answer| answer.body);
        assert_eq!(body("/proxyMode").as_deref(), Some("ebpf"));
        assert_eq!(body("/healthz").as_deref(), Some("ok"));
        assert_eq!(body("/configz").as_deref(), Some("{}"));
        assert_eq!(body("/"), None);
    }

    #[test]
    fn before_the_first_sync_there_is_no_time_of_one() {
        let page = answer("/metrics", &Status::default(), None, "").unwrap().body;
        assert!(!page.contains("svc_sync_last_timestamp_seconds"));
        assert!(page.contains("svc_source_connected 0\n"));
    }
}
