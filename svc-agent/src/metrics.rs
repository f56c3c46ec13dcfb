//! `/metrics` in Prometheus' text format, and what else kube-proxy serves on that port.
mod kube_proxy;
mod process;

use std::fmt::{Display, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use hyper::StatusCode;
use svc_common::map::Traffic;
use tracing::warn;

use crate::census::{Census, Told};
use crate::dataplane::ReadCounters;
use crate::histogram::Histogram;
use crate::plan::PortName;
use crate::serve::Answer;
use crate::status::{Status, Sync};
use crate::traffic::Totals;

/// What svc calls its own way, where kube-proxy has iptables, ipvs or nftables.
pub const PROXY_MODE: &str = "ebpf";

/// At most so often the kernel's maps are looked through, whoever asks.
const CENSUS_EVERY: Duration = Duration::from_secs(1);

/// What is served on kube-proxy's metrics port, at its paths.
pub struct Exporter {
    status: Arc<Status>,
    counters: Option<Box<ReadCounters>>,
    maps: PathBuf,
    configz: String,
    census: Mutex<Counted>,
}

/// The last look through the maps.
struct Counted {
    told: Told,
    totals: Totals,
    last: Option<(Instant, Census)>,
}

impl Exporter {
    /// `maps`: where they are pinned; `configz`: what that path says; `services`: of how many Service ports the connections are
    /// told.
    pub fn new(
        status: Arc<Status>,
        counters: Option<Box<ReadCounters>>,
        maps: PathBuf,
        configz: String,
        services: usize,
    ) -> Self {
        let census = Mutex::new(Counted { told: Told::new(services), totals: Totals::default(), last: None });
        Exporter { status, counters, maps, configz, census }
    }

    pub async fn answer(self: Arc<Self>, path: String) -> Option<Answer> {
        let census = if path == "/metrics" {
            let this = Arc::clone(&self);
            // It takes longer than the others on this thread may have to wait.
            match tokio::task::spawn_blocking(move || this.census()).await {
                Ok(Ok(census)) => Some(census),
                Ok(Err(error)) => {
                    warn!("cannot count what is in the kernel's maps: {error:#}");
                    None
                }
                Err(_) => None,
            }
        } else {
            None
        };
        answer(&path, &self.status, self.counters.as_deref(), census.as_ref(), &self.configz)
    }

    fn census(&self) -> anyhow::Result<Census> {
        let mut counted = self.census.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((time, census)) = &counted.last
            && time.elapsed() < CENSUS_EVERY
        {
            return Ok(census.clone());
        }
        let Counted { told, totals, .. } = &mut *counted;
        let census = Census::take(&self.maps, told, totals)?;
        counted.last = Some((Instant::now(), census.clone()));
        Ok(census)
    }
}

fn answer(
    path: &str,
    status: &Status,
    counters: Option<&ReadCounters>,
    census: Option<&Census>,
    configz: &str,
) -> Option<Answer> {
    const PLAIN: &str = "text/plain; charset=utf-8";
    let (content_type, body) = match path {
        "/metrics" => ("text/plain; version=0.0.4; charset=utf-8", text(status, counters, census)),
        "/proxyMode" => (PLAIN, PROXY_MODE.to_owned()),
        // That the process answers; the health of its work is on a port of its own.
        "/healthz" => (PLAIN, "ok".to_owned()),
        "/configz" => ("application/json", configz.to_owned()),
        _ => return None,
    };
    Some(Answer { status: StatusCode::OK, content_type, body })
}

fn text(status: &Status, counters: Option<&ReadCounters>, census: Option<&Census>) -> String {
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
    page.watches(status);
    if let Some(census) = census {
        page.census(census, progress.last.as_ref().map(|(_, sync)| sync));
    }
    kube_proxy::write(&mut page, status);
    process::write(&mut page);
    page.text
}

fn labels(PortName { service, port, protocol, family }: &PortName) -> String {
    let labels = [
        ("namespace", service.namespace.to_string()),
        ("service", service.name.to_string()),
        ("port", port.to_string()),
        ("protocol", protocol.to_string()),
        ("ip_family", family.to_string()),
    ];
    let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value))).collect();
    labels.join(",")
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn watches(&mut self, status: &Status) {
        let input = status.input();
        self.family(
            "svc_watch_lag_seconds",
            "gauge",
            "How long the oldest change waits that is not in force; 0: none.",
        );
        let lag = input.waiting_since.map_or(0.0, |since| since.elapsed().unwrap_or_default().as_secs_f64());
        self.sample("svc_watch_lag_seconds", "", lag);
        let name = "svc_watch_last_event_timestamp_seconds";
        self.family(name, "gauge", "When the watch of this kind last told of a change.");
        for (kind, time) in &input.events {
            let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
            self.sample(name, &format!("resource=\"{kind}\""), seconds);
        }
    }

    fn census(&mut self, census: &Census, sync: Option<&Sync>) {
        self.family("svc_flows", "gauge", "Flows under way, by state.");
        for (state, count) in Census::STATES.iter().zip(census.flows) {
            self.sample("svc_flows", &format!("state=\"{}\"", state.label()), count);
        }
        let mut entries = census.entries.clone();
        entries.extend(sync.into_iter().flat_map(|sync| sync.entries));
        self.family("svc_map_entries", "gauge", "Entries of each kernel map.");
        for (map, count) in entries.iter().filter(|(map, _)| census.max_entries.contains_key(*map)) {
            self.sample("svc_map_entries", &format!("map=\"{map}\""), count);
        }
        self.family("svc_map_max_entries", "gauge", "Entries that each kernel map has room for.");
        for (map, count) in &census.max_entries {
            self.sample("svc_map_max_entries", &format!("map=\"{map}\""), count);
        }
        let name = "svc_service_connections_total";
        self.family(name, "counter", "Flows opened and sockets pointed at a backend, by Service port.");
        for port in &census.ports {
            self.sample(name, &labels(&port.name), port.connections);
        }
        if census.counts_bytes {
            let name = "svc_service_bytes_total";
            self.family(name, "counter", "Bytes of translated packets, by Service port and direction.");
            for port in &census.ports {
                let (labels, Traffic { to_backend, from_backend }) = (labels(&port.name), port.traffic);
                for (direction, bytes) in [("to_backend", to_backend), ("from_backend", from_backend)] {
                    self.sample(name, &format!("{labels},direction=\"{direction}\""), bytes);
                }
            }
        }
        let name = "svc_service_ports_untold";
        self.family(name, "gauge", "Service ports with connections that svc_service_connections_total leaves out.");
        self.sample(name, "", census.left_out);
    }

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

/// A label's value, as the text format has it.
fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::census::PortCounts;
    use svc_common::Reason;
    use svc_common::map::Counter;

    use super::*;
    use crate::object::{Family, ObjectName, Protocol};
    use crate::status::{Resync, WithoutLocal};
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
            entries: [("frontends", 2); 8],
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
        status.heard("services");
        let port = PortName {
            service: ObjectName::new("default", "we\"b"),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        let census = Census {
            flows: [1, 2, 3, 4],
            entries: [("flows", 20)].into(),
            max_entries: [("flows", 1024), ("frontends", 8)].into(),
            ports: vec![PortCounts { name: port, connections: 7, traffic: Traffic { to_backend: 8, from_backend: 9 } }],
            counts_bytes: true,
            left_out: 3,
        };
        answer("/metrics", &status, Some(&read), Some(&census), "").unwrap().body
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
            "svc_flows{state=\"established\"} 2",
            "svc_map_entries{map=\"flows\"} 20",
            "svc_map_entries{map=\"frontends\"} 2",
            "svc_map_max_entries{map=\"flows\"} 1024",
            r#"svc_service_connections_total{namespace="default",service="we\"b",port="http",protocol="TCP",ip_family="IPv4"} 7"#,
            r#"svc_service_bytes_total{namespace="default",service="we\"b",port="http",protocol="TCP",ip_family="IPv4",direction="from_backend"} 9"#,
            "svc_service_ports_untold 3",
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
        let body = |path| answer(path, &Status::default(), None, None, "{}").map(|answer| answer.body);
        assert_eq!(body("/proxyMode").as_deref(), Some("ebpf"));
        assert_eq!(body("/healthz").as_deref(), Some("ok"));
        assert_eq!(body("/configz").as_deref(), Some("{}"));
        assert_eq!(body("/"), None);
    }

    #[test]
    fn before_the_first_sync_there_is_no_time_of_one() {
        let page = answer("/metrics", &Status::default(), None, None, "").unwrap().body;
        assert!(!page.contains("svc_sync_last_timestamp_seconds"));
        assert!(page.contains("svc_source_connected 0\n"));
    }
}
