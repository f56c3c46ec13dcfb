//! The metrics that kube-proxy has, under its names, as far as they mean something here: dashboards and alerts go on.
//! What has a family there is told for both, since one write serves both.
use std::time::{SystemTime, UNIX_EPOCH};

use super::Page;
use crate::histogram::Histogram;
use crate::status::Status;

const FAMILIES: [&str; 2] = ["ip_family=\"IPv4\"", "ip_family=\"IPv6\""];

pub(super) fn write(page: &mut Page, status: &Status) {
    let (progress, repairs, input) = (status.progress(), status.repairs(), status.input());
    let mut all = progress.syncs.clone();
    all.add(&repairs.resyncs);
    for (name, help, histogram) in [
        ("sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds", &all),
        (
            "sync_partial_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for partial resyncs",
            &progress.syncs,
        ),
        (
            "sync_full_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for full resyncs",
            &repairs.resyncs,
        ),
    ] {
        page.histograms(&format!("kubeproxy_{name}"), help, FAMILIES.map(|family| (family.to_owned(), histogram)));
    }
    let [v4, v6] = FAMILIES;
    let latencies: [(String, &Histogram); 2] =
        [(v4.to_owned(), &input.programming[0]), (v6.to_owned(), &input.programming[1])];
    let help = "In Cluster Network Programming Latency in seconds";
    page.histograms("kubeproxy_network_programming_duration_seconds", help, latencies);

    let last = progress.last.map(|(time, _)| time);
    let help = "The last time proxy rules were successfully synced";
    page.time("kubeproxy_sync_proxy_rules_last_timestamp_seconds", help, last);
    let help = "The last time a sync of proxy rules was queued";
    page.time("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", help, input.last);

    for (name, kind, help, value) in [
        ("endpoint_changes_pending", "gauge", "Pending proxy rules Endpoint changes", input.slices_pending),
        ("endpoint_changes_total", "counter", "Cumulative proxy rules Endpoint changes", input.slices),
        ("service_changes_pending", "gauge", "Pending proxy rules Service changes", input.services_pending),
        ("service_changes_total", "counter", "Cumulative proxy rules Service changes", input.services),
    ] {
        let name = format!("kubeproxy_sync_proxy_rules_{name}");
        page.family(&name, kind, help);
        page.sample(&name, "", value);
    }
    if let Some((_, sync)) = progress.last {
        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        page.family(name, "gauge", "Number of services with a Local traffic policy and no endpoints");
        for (policy, counts) in [("internal", sync.without_local.internal), ("external", sync.without_local.external)] {
            for (family, count) in FAMILIES.iter().zip(counts) {
                page.sample(name, &format!("{family},traffic_policy=\"{policy}\""), count);
            }
        }
    }
    let answers = status.answers();
    for (name, help, answers) in [
        ("kubeproxy_proxy_healthz_total", "Cumulative proxy healthz HTTP status", &answers.healthz),
        ("kubeproxy_proxy_livez_total", "Cumulative proxy livez HTTP status", &answers.livez),
    ] {
        page.family(name, "counter", help);
        for (code, count) in answers {
            page.sample(name, &format!("code=\"{code}\""), count);
        }
    }

    let requests = status.requests();
    let name = "rest_client_requests_total";
    page.family(name, "counter", "Number of HTTP requests, partitioned by status code, method, and host.");
    for ((method, host, code), count) in &requests.count {
        page.sample(name, &format!("code=\"{code}\",host=\"{host}\",method=\"{method}\""), count);
    }
    let durations = requests.durations.iter();
    page.histograms(
        "rest_client_request_duration_seconds",
        "Request latency in seconds. Broken down by verb, and host.",
        durations.map(|((verb, host), histogram)| (format!("host=\"{host}\",verb=\"{verb}\""), histogram)),
    );
}

impl Page {
    /// Of both families; nothing where there is no such time yet.
    fn time(&mut self, name: &str, help: &str, time: Option<SystemTime>) {
        let Some(time) = time else { return };
        self.family(name, "gauge", help);
        for family in FAMILIES {
            self.sample(name, family, time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        }
    }
}
