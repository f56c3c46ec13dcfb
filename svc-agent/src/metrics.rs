//! `/metrics` in Prometheus' text format, and what else kube-proxy serves on that port.
mod kube_proxy;
mod process;

use std::fmt::{Display, Write as _};
use std::time::UNIX_EPOCH;

use hyper::StatusCode;

use crate::dataplane::ReadCounters;
use crate::histogram::Histogram;
use crate::serve::Answer;
use crate::status::Status;

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
    page.histograms("svc_sync_duration_seconds", help, [(String::new(), &progress.syncs)]);
    page.family("svc_sync_operations_total", "counter", "Map entries written or deleted.");
    page.sample("svc_sync_operations_total", "", progress.operations);
    page.family("svc_sync_errors_total", "counter", "Syncs that the kernel refused.");
    page.sample("svc_sync_errors_total", "", status.failures());
    let repairs = status.repairs();
    let help = "Time to read the kernel's maps back and repair them.";
    page.histograms("svc_resync_duration_seconds", help, [(String::new(), &repairs.resyncs)]);
    page.family("svc_repairs_total", "counter", "Map entries and links that somebody else changed, repaired.");
    for (map, count) in &repairs.repaired {
        page.sample("svc_repairs_total", &format!("map=\"{map}\""), count);
    }
    page.family("svc_udp_sockets_terminated_total", "counter", "Connected UDP sockets whose backend had left.");
    page.sample("svc_udp_sockets_terminated_total", "", status.all_sockets_terminated());
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
    kube_proxy::write(&mut page, status);
    process::write(&mut page);
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

    /// One family, a histogram for each set of labels.
    fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        histograms: impl IntoIterator<Item = (String, &'a Histogram)>,
    ) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for (labels, histogram) in histograms {
            let with = |bound: &str| {
                let comma = if labels.is_empty() { "" } else { "," };
                format!("{labels}{comma}le=\"{bound}\"")
            };
            for (bound, count) in &histogram.buckets {
                self.sample(&bucket, &with(&bound.to_string()), count);
            }
            self.sample(&bucket, &with("+Inf"), histogram.count);
            self.sample(&format!("{name}_sum"), &labels, histogram.total.as_secs_f64());
            self.sample(&format!("{name}_count"), &labels, histogram.count);
        }
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
    use crate::object::Family;
    use crate::status::{Resync, Sync, WithoutLocal};
    use rstest::rstest;

    /// Of an agent to which everything has happened.
    fn page() -> String {
        let status = Status::default();
        status.queued(3, 2);
        status.queued(0, 4);
        status.synced(Sync {
            took: Duration::from_millis(2),
            operations: 3,
            services: 1,
            frontends: 2,
            backends: 4,
            without_local: WithoutLocal { internal: [1, 2], external: [3, 4] },
        });
        status.resynced(&Resync { took: Duration::from_millis(20), repaired: [("cidrs", 2)].into() });
        status.queued(1, 0);
        status.programmed(Family::V6, Duration::from_millis(700));
        status.asked(false, 503);
        status.requested("GET", "192.0.2.1:6443", Some(200), Duration::from_millis(30));
        status.requested("GET", "192.0.2.1:6443", None, Duration::from_secs(1));
        status.sockets_terminated(2);
        status.sockets_terminated(1);
        let read = || Reason::ALL.iter().map(|reason| (*reason, Counter { packets: 5, bytes: 6 })).collect();
        answer("/metrics", &status, Some(&read), "").unwrap().body
    }

    #[test]
    fn every_sample_belongs_to_a_family_that_is_announced_before_it() {
        let page = page();
        let mut family = "";
        for line in page.lines() {
            if let Some(announced) = line.strip_prefix("# TYPE ") {
                family = announced.split(' ').next().unwrap();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} under {family}");
            }
        }
        for name in ["kubeproxy_sync_proxy_rules_last_timestamp_seconds", "process_resident_memory_bytes"] {
            assert!(page.lines().any(|line| line.starts_with(name)), "{name} in\n{page}");
        }
        for sample in [
            "svc_backends 4",
            "svc_sync_duration_seconds_bucket{le=\"0.001\"} 0",
            "svc_sync_duration_seconds_bucket{le=\"0.003\"} 1",
            "svc_udp_sockets_terminated_total 3",
            "svc_packets_total{reason=\"flow_hit\"} 5",
            "svc_bytes_total{reason=\"no_backend\"} 6",
            "svc_repairs_total{map=\"cidrs\"} 2",
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 2",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.03\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.5\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"1\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"300\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 4",
            "kubeproxy_sync_proxy_rules_service_changes_pending 1",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 6",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"internal\"} 2",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"} 3",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "rest_client_requests_total{code=\"200\",host=\"192.0.2.1:6443\",method=\"GET\"} 1",
            "rest_client_requests_total{code=\"<error>\",host=\"192.0.2.1:6443\",method=\"GET\"} 1",
            "rest_client_request_duration_seconds_count{host=\"192.0.2.1:6443\",verb=\"GET\"} 2",
        ] {
            assert!(page.lines().any(|line| line == sample), "{sample} in\n{page}");
        }
    }

    #[rstest]
    #[case::dashboard(include_str!("../../deploy/grafana/dashboard.json"))]
    #[case::alerts(include_str!("../../deploy/grafana/alerts.yaml"))]
    fn dashboards_and_alerts_ask_for_what_is_told(#[case] file: &str) {
        let page = page();
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = file.split(|c| !is_word(c));
        let mut names: Vec<&str> = words
            .filter(|word| ["svc_", "kubeproxy_", "process_"].iter().any(|prefix| word.starts_with(prefix)))
            .map(|word| word.strip_suffix("_bucket").unwrap_or(word))
            .collect();
        names.dedup();
        assert!(names.len() >= 5, "{names:?}");
        for name in names {
            assert!(page.contains(&format!("# TYPE {name} ")), "{name}");
        }
        for reasons in
            file.split("reason").filter_map(|rest| rest.trim_start_matches(['=', '~', '\\']).strip_prefix('"'))
        {
            let reasons = reasons.split(['"', '\\']).next().unwrap();
            for reason in reasons.split('|') {
                assert!(Reason::ALL.iter().any(|known| known.label() == reason), "{reason}");
            }
        }
    }

    #[test]
    fn an_alerts_runbook_is_a_heading_of_the_documents() {
        let operations = include_str!("../../docs/operations.md");
        let headings = operations.lines().filter_map(|line| line.strip_prefix("## "));
        let anchors: Vec<String> = headings.map(|heading| heading.to_lowercase().replace(' ', "-")).collect();
        let alerts = include_str!("../../deploy/grafana/alerts.yaml");
        let runbooks: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")).collect();
        assert_eq!(runbooks.len(), alerts.matches("- alert:").count());
        for runbook in runbooks {
            let anchor = runbook.strip_prefix("docs/operations.md#");
            assert!(
                runbook == "docs/dataplane.md" || anchors.iter().any(|known| Some(&**known) == anchor),
                "{runbook}"
            );
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
