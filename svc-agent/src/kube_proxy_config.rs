//! Kube-proxy's configuration file, KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), with its own field names.
//! Each field is taken, or named in a warning where it is set and has no meaning here. As in kube-proxy, a field that is
//! empty, zero or false is as good as not given. Unlike there, a field that does not exist is an error.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cidrs::DetectLocalMode;
use crate::cli::timeouts::TimeoutArgs;
use crate::go_duration;
use crate::host;
use crate::plan::NodePortAddresses;

/// Kube-proxy's ports for health and for metrics.
pub const HEALTHZ_PORT: u16 = 10256;
pub const METRICS_PORT: u16 = 10249;

/// The one of kube-proxy's feature gates that svc has.
pub const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";

/// What counts of the file. None, or empty: the file does not say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KubeProxyConfig {
    pub kubeconfig: Option<PathBuf>,
    pub hostname_override: Option<String>,
    pub healthz_bind_address: Option<SocketAddr>,
    pub metrics_bind_address: Option<SocketAddr>,
    pub cluster_cidr: Vec<IpNet>,
    pub detect_local_mode: Option<DetectLocalMode>,
    pub bridge_interface: Option<String>,
    pub interface_name_prefix: Option<String>,
    pub nodeport_addresses: Option<NodePortAddresses>,
    pub masquerade_all: Option<bool>,
    /// The feature gate AllowServiceExternalIPs (KEP-5707).
    pub external_ips: Option<bool>,
    pub min_sync_period: Option<Duration>,
    pub sync_period: Option<Duration>,
    pub oom_score_adj: Option<i32>,
    pub timeouts: TimeoutArgs,
    /// In flows.
    pub flow_table_size: Option<u32>,
}

/// What becomes of a field.
#[derive(Clone, Copy)]
enum Use {
    Taken,
    /// Of the section of one proxy mode: taken in that mode.
    OfMode,
    /// It has no meaning here, since ...
    No(&'static str),
}

/// kube-proxy's conntrack.maxPerCore and conntrack.min where the file has none.
const FLOWS_A_CORE: u32 = 32_768;
const LEAST_FLOWS: u32 = 131_072;
/// Where neither the command line nor the file asks for more: 256 MiB.
const MOST_FLOWS: u32 = 1 << 20;
/// What `--flow-table-size` may be.
pub const FLOW_TABLE_SIZES: std::ops::RangeInclusive<i64> = 64..=1 << 28;

/// The flow table's size on a node with so many cores, in flows.
pub fn default_flow_table_size(cores: u32) -> u32 {
    FLOWS_A_CORE.saturating_mul(cores).clamp(LEAST_FLOWS, MOST_FLOWS)
}

const NO_CONNTRACK: &str = "svc has a flow table of its own (--flow-table-size), and uses no conntrack";
const NO_MARKS: &str = "svc marks no packets";
const CLIENT: &str = "the client is svc's own";
const ENCODING: &str = "svc takes protobuf, and JSON where the API server has none";
const NOT_WINDOWS: &str = "this is not Windows";
const NO_IPVS: &str = "svc does not use IPVS";
const LOGGING: &str = "logging is set by --verbose and --log-format";

/// Every field there is, and some that there were, by path.
const FIELDS: [(&str, Use); 56] = [
    ("apiVersion", Use::Taken),
    ("kind", Use::Taken),
    // Not the file's own, but what kubectl and kind write.
    ("metadata", Use::Taken),
    // Each gate for itself, see `gates`.
    ("featureGates", Use::Taken),
    ("clientConnection.kubeconfig", Use::Taken),
    ("clientConnection.acceptContentTypes", Use::No(ENCODING)),
    ("clientConnection.contentType", Use::No(ENCODING)),
    ("clientConnection.qps", Use::No(CLIENT)),
    ("clientConnection.burst", Use::No(CLIENT)),
    ("logging.format", Use::No(LOGGING)),
    ("logging.flushFrequency", Use::No(LOGGING)),
    ("logging.verbosity", Use::No(LOGGING)),
    ("logging.vmodule", Use::No(LOGGING)),
    ("logging.options", Use::No(LOGGING)),
    ("hostnameOverride", Use::Taken),
    ("bindAddress", Use::Taken),
    ("healthzBindAddress", Use::Taken),
    ("metricsBindAddress", Use::Taken),
    // It always is.
    ("bindAddressHardFail", Use::Taken),
    ("enableProfiling", Use::No("svc serves no profiles")),
    ("showHiddenMetricsForVersion", Use::No("svc hides no metrics")),
    ("mode", Use::Taken),
    ("iptables.masqueradeBit", Use::No(NO_MARKS)),
    ("iptables.masqueradeAll", Use::OfMode),
    ("iptables.localhostNodePorts", Use::No("node ports always answer on the loopback addresses, to the node itself")),
    ("iptables.syncPeriod", Use::OfMode),
    ("iptables.minSyncPeriod", Use::OfMode),
    ("ipvs.syncPeriod", Use::OfMode),
    ("ipvs.minSyncPeriod", Use::OfMode),
    ("ipvs.scheduler", Use::No(NO_IPVS)),
    ("ipvs.excludeCIDRs", Use::No(NO_IPVS)),
    ("ipvs.strictARP", Use::No(NO_IPVS)),
    ("ipvs.tcpTimeout", Use::No(NO_IPVS)),
    ("ipvs.tcpFinTimeout", Use::No(NO_IPVS)),
    ("ipvs.udpTimeout", Use::No(NO_IPVS)),
    ("nftables.masqueradeBit", Use::No(NO_MARKS)),
    ("nftables.masqueradeAll", Use::OfMode),
    ("nftables.syncPeriod", Use::OfMode),
    ("nftables.minSyncPeriod", Use::OfMode),
    ("winkernel", Use::No(NOT_WINDOWS)),
    ("detectLocalMode", Use::Taken),
    ("detectLocal.bridgeInterface", Use::Taken),
    ("detectLocal.interfaceNamePrefix", Use::Taken),
    ("clusterCIDR", Use::Taken),
    ("nodePortAddresses", Use::Taken),
    ("oomScoreAdj", Use::Taken),
    ("conntrack.maxPerCore", Use::Taken),
    ("conntrack.min", Use::Taken),
    ("conntrack.tcpEstablishedTimeout", Use::Taken),
    ("conntrack.tcpCloseWaitTimeout", Use::Taken),
    ("conntrack.tcpBeLiberal", Use::No(NO_CONNTRACK)),
    ("conntrack.udpTimeout", Use::Taken),
    ("conntrack.udpStreamTimeout", Use::Taken),
    ("configSyncPeriod", Use::No("watches need no list to be read again")),
    ("portRange", Use::No("kube-proxy has not used it for long, either")),
    ("windowsRunAsService", Use::No(NOT_WINDOWS)),
];

/// Also returns a warning for each field that is set and has no meaning here.
///
/// # Errors
/// Where the text is none of this kind and version, has a field that does not exist, or one with a value that it cannot
/// have; the error names the field.
pub fn parse(text: &str) -> anyhow::Result<(KubeProxyConfig, Vec<String>)> {
    let options = serde_saphyr::options! { with_snippet: false };
    let file: Value = serde_saphyr::from_str_with_options(text, options).context("it is no YAML")?;
    let file = File(file);
    let (version, kind) = (file.text("apiVersion")?, file.text("kind")?);
    ensure!(
        kind.as_deref() == Some("KubeProxyConfiguration")
            && version.as_deref() == Some("kubeproxy.config.k8s.io/v1alpha1"),
        "it is no KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, but kind {kind:?} of apiVersion {version:?}"
    );
    let section = match file.text("mode")?.as_deref() {
        None | Some("iptables") => "iptables",
        Some("nftables") => "nftables",
        Some("ipvs") => "ipvs",
        Some(other) => bail!("mode: {other:?} is no mode of kube-proxy on Linux"),
    };
    let mut warnings = Vec::new();
    check(&file.0, "", section, &mut warnings)?;

    let everywhere = match file.address("bindAddress")? {
        Some(address) if !address.is_unspecified() => {
            warnings
                .push("bindAddress: the node's addresses are those of its Node object and its interfaces".to_owned());
            address.is_ipv6().then_some(address)
        }
        address => address.filter(IpAddr::is_ipv6),
    };
    // An IPv6 bindAddress moves what listens to that family.
    let healthz_default = everywhere.map(|_| SocketAddr::from((Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT)));
    let metrics_default = everywhere.map(|_| SocketAddr::from((Ipv6Addr::LOCALHOST, METRICS_PORT)));
    let of_section = |field: &str| format!("{section}.{field}");
    let config = KubeProxyConfig {
        kubeconfig: file.text("clientConnection.kubeconfig")?.map(Into::into),
        hostname_override: file.text("hostnameOverride")?,
        healthz_bind_address: file.socket_address("healthzBindAddress", HEALTHZ_PORT)?.or(healthz_default),
        metrics_bind_address: file.socket_address("metricsBindAddress", METRICS_PORT)?.or(metrics_default),
        cluster_cidr: file.cidrs("clusterCIDR")?,
        detect_local_mode: file
            .text("detectLocalMode")?
            .map(|mode| mode.parse().map_err(|_| anyhow::anyhow!("detectLocalMode: {mode:?} is no mode of kube-proxy")))
            .transpose()?,
        bridge_interface: file.text("detectLocal.bridgeInterface")?,
        interface_name_prefix: file.text("detectLocal.interfaceNamePrefix")?,
        nodeport_addresses: file
            .get::<Vec<String>>("nodePortAddresses")?
            .map(|list| list.join(",").parse().map_err(|error: String| anyhow::anyhow!("nodePortAddresses: {error}")))
            .transpose()?,
        masquerade_all: file.get(&of_section("masqueradeAll"))?,
        external_ips: file.gates(&mut warnings)?,
        min_sync_period: file.duration(&of_section("minSyncPeriod"))?,
        sync_period: file.duration(&of_section("syncPeriod"))?,
        oom_score_adj: file.get("oomScoreAdj")?,
        timeouts: TimeoutArgs {
            conntrack_tcp_timeout_established: file.duration("conntrack.tcpEstablishedTimeout")?,
            conntrack_tcp_timeout_close_wait: file.duration("conntrack.tcpCloseWaitTimeout")?,
            conntrack_udp_timeout: file.duration("conntrack.udpTimeout")?,
            conntrack_udp_timeout_stream: file.duration("conntrack.udpStreamTimeout")?,
            conntrack_sctp_timeout_established: None,
        },
        flow_table_size: file.flow_table_size(host::online_cpus())?,
    };
    Ok((config, warnings))
}

/// Goes through all fields below `path`.
fn check(value: &Value, path: &str, section: &str, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let Value::Object(fields) = value else { bail!("{path} has fields of its own, and no value") };
    for (name, value) in fields {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match FIELDS.iter().find(|(field, _)| *field == path) {
            Some((_, Use::No(reason))) if is_set(value) => warnings.push(format!("{path}: {reason}")),
            Some((_, Use::OfMode)) if is_set(value) && !path.starts_with(&format!("{section}.")) => {
                warnings.push(format!("{path}: the file's mode is {section}"));
            }
            Some(_) => {}
            None if FIELDS.iter().any(|(field, _)| field.starts_with(&format!("{path}."))) => {
                if !value.is_null() {
                    check(value, &path, section, warnings)?;
                }
            }
            None => bail!("unknown field {path:?}"),
        }
    }
    Ok(())
}

/// Otherwise it is as good as not given.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is) => *is,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !["", "0", "0s"].contains(&text.as_str()),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => fields.values().any(is_set),
    }
}

struct File(Value);

impl File {
    fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Option<T>> {
        let value = path.split('.').try_fold(&self.0, |value, name| value.get(name));
        match value.filter(|value| is_set(value)) {
            Some(value) => serde_json::from_value(value.clone()).map(Some).with_context(|| path.to_owned()),
            None => Ok(None),
        }
    }

    /// What the one gate says that has a meaning here. Unlike a field, a gate that is false is set; one that svc does not have
    /// is off.
    fn gates(&self, warnings: &mut Vec<String>) -> anyhow::Result<Option<bool>> {
        let gates = match self.0.get("featureGates") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(gates)) => gates,
            Some(other) => bail!("featureGates: {other} is no map of gates"),
        };
        let mut external_ips = None;
        for (name, value) in gates {
            let on =
                value.as_bool().with_context(|| format!("featureGates.{name}: {value} is neither true nor false"))?;
            if name == EXTERNAL_IPS_GATE {
                external_ips = Some(on);
            } else if on {
                warnings.push(format!("featureGates.{name}: svc has no such feature gate"));
            }
        }
        Ok(external_ips)
    }

    /// None where neither field is set. As kube-proxy does with them, a number a core counts for nothing where it is 0.
    fn flow_table_size(&self, cores: u32) -> anyhow::Result<Option<u32>> {
        let (a_core, least) = (self.get::<u32>("conntrack.maxPerCore")?, self.get::<u32>("conntrack.min")?);
        let none_a_core = self.0.pointer("/conntrack/maxPerCore").and_then(Value::as_i64) == Some(0);
        if none_a_core || a_core.is_none() && least.is_none() {
            return Ok(None);
        }
        let size = a_core.unwrap_or(FLOWS_A_CORE).saturating_mul(cores).max(least.unwrap_or(LEAST_FLOWS));
        let size = Some(size).filter(|size| FLOW_TABLE_SIZES.contains(&i64::from(*size)));
        size.map(Some).with_context(|| format!("conntrack.maxPerCore, conntrack.min: there is no flow table of such a size, but of {FLOW_TABLE_SIZES:?} flows"))
    }

    fn text(&self, path: &str) -> anyhow::Result<Option<String>> {
        self.get(path)
    }

    fn duration(&self, path: &str) -> anyhow::Result<Option<Duration>> {
        let text = self.text(path)?;
        text.map(|text| go_duration::parse(&text).map_err(|error| anyhow::anyhow!("{path}: {error}"))).transpose()
    }

    fn address(&self, path: &str) -> anyhow::Result<Option<IpAddr>> {
        let text = self.text(path)?;
        text.map(|text| text.parse().with_context(|| format!("{path}: {text:?} is no address"))).transpose()
    }

    /// An address alone gets this port.
    fn socket_address(&self, path: &str, port: u16) -> anyhow::Result<Option<SocketAddr>> {
        let Some(text) = self.text(path)? else { return Ok(None) };
        let alone = text.parse().map(|address: IpAddr| SocketAddr::new(address, port));
        // As Go has it, no host is every one.
        let any = || text.strip_prefix(':')?.parse().ok().map(|port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        let parsed = alone.or_else(|_| text.parse()).ok().or_else(any);
        parsed.map(Some).with_context(|| format!("{path}: {text:?} is no address with a port"))
    }

    fn cidrs(&self, path: &str) -> anyhow::Result<Vec<IpNet>> {
        let text = self.text(path)?.unwrap_or_default();
        let list = text.split(',').map(str::trim).filter(|cidr| !cidr.is_empty());
        list.map(|cidr| cidr.parse().with_context(|| format!("{path}: {cidr:?} is no CIDR"))).collect()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// What kubeadm writes into the ConfigMap kube-proxy of kube-system.
    const KUBEADM: &str = include_str!("kube_proxy_config/kubeadm.yaml");
    /// What kind does.
    const KIND: &str = include_str!("kube_proxy_config/kind.yaml");

    const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    fn parsed(fields: &str) -> anyhow::Result<(KubeProxyConfig, Vec<String>)> {
        parse(&format!("{HEAD}{fields}"))
    }

    #[test]
    fn kubeadms_file_says_where_the_api_server_and_the_pods_are_and_nothing_else() {
        let (config, warnings) = parse(KUBEADM).unwrap();
        let expected = KubeProxyConfig {
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            cluster_cidr: vec!["10.244.0.0/16".parse().unwrap()],
            ..KubeProxyConfig::default()
        };
        assert_eq!(config, expected);
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn kinds_file_is_kubeadms_with_a_pace() {
        let (config, warnings) = parse(KIND).unwrap();
        let expected = KubeProxyConfig {
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            cluster_cidr: ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().unwrap()).to_vec(),
            healthz_bind_address: Some("[::]:10256".parse().unwrap()),
            metrics_bind_address: Some("[::1]:10249".parse().unwrap()),
            min_sync_period: Some(Duration::from_secs(1)),
            ..KubeProxyConfig::default()
        };
        assert_eq!(config, expected);
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn every_field_that_has_a_meaning_is_taken() {
        let (config, warnings) = parsed(
            "clientConnection: { kubeconfig: /k }\nhostnameOverride: node-a\nhealthzBindAddress: 192.0.2.1\n\
             metricsBindAddress: ':1'\nclusterCIDR: ' 10.1.0.0/16,fd00::/64'\ndetectLocalMode: BridgeInterface\n\
             detectLocal: { bridgeInterface: cni0, interfaceNamePrefix: veth }\nnodePortAddresses: [primary]\n\
             conntrack: { udpTimeout: 45s }\nfeatureGates: { AllowServiceExternalIPs: false }\nmode: nftables\nnftables: { masqueradeAll: true, minSyncPeriod: 500ms, syncPeriod: 1m30s }\noomScoreAdj: -999\n",
        )
        .unwrap();
        let expected = KubeProxyConfig {
            kubeconfig: Some("/k".into()),
            hostname_override: Some("node-a".to_owned()),
            healthz_bind_address: Some("192.0.2.1:10256".parse().unwrap()),
            metrics_bind_address: Some("0.0.0.0:1".parse().unwrap()),
            cluster_cidr: ["10.1.0.0/16", "fd00::/64"].map(|cidr| cidr.parse().unwrap()).to_vec(),
            detect_local_mode: Some(DetectLocalMode::BridgeInterface),
            bridge_interface: Some("cni0".to_owned()),
            interface_name_prefix: Some("veth".to_owned()),
            nodeport_addresses: Some(NodePortAddresses::Primary),
            masquerade_all: Some(true),
            external_ips: Some(false),
            min_sync_period: Some(Duration::from_millis(500)),
            sync_period: Some(Duration::from_secs(90)),
            oom_score_adj: Some(-999),
            timeouts: TimeoutArgs { conntrack_udp_timeout: Some(Duration::from_secs(45)), ..TimeoutArgs::default() },
            flow_table_size: None,
        };
        assert_eq!((config, warnings), (expected, vec![]));
    }

    #[rstest]
    #[case::conntrack("conntrack: { min: 131072, tcpBeLiberal: true }", &["conntrack.tcpBeLiberal"])]
    #[case::ipvs("mode: ipvs\nipvs: { strictARP: true, scheduler: rr }", &["ipvs.scheduler", "ipvs.strictARP"])]
    #[case::gates("featureGates: { SupportIPVSProxyMode: true }", &["featureGates.SupportIPVSProxyMode"])]
    #[case::a_gate_that_is_off("featureGates: { SupportIPVSProxyMode: false, AllowServiceExternalIPs: true }", &[])]
    #[case::another_mode("mode: nftables\niptables: { syncPeriod: 5s }", &["iptables.syncPeriod"])]
    #[case::bind_address("bindAddress: 192.0.2.1", &["bindAddress"])]
    #[case::marks("iptables: { masqueradeBit: 14 }", &["iptables.masqueradeBit"])]
    #[case::profiling("enableProfiling: true", &["enableProfiling"])]
    #[case::logging("logging: { format: json, options: { text: { splitStream: true } } }", &["logging.format", "logging.options"])]
    #[case::nothing("bindAddress: 0.0.0.0\nconntrack: { maxPerCore: 0 }\nconfigSyncPeriod: 0s", &[])]
    fn a_field_without_meaning_is_named_once(#[case] fields: &str, #[case] named: &[&str]) {
        let (_, warnings) = parsed(fields).unwrap();
        let names: Vec<&str> = warnings.iter().map(|warning| warning.split(':').next().unwrap()).collect();
        assert_eq!(names, named, "{warnings:?}");
    }

    #[rstest]
    #[case::unknown("clusterCidr: 10.0.0.0/8", "clusterCidr")]
    #[case::unknown_in_a_section("iptables: { masquerade: true }", "iptables.masquerade")]
    #[case::type_of_a_field("iptables: { masqueradeAll: 'yes' }", "iptables.masqueradeAll")]
    #[case::section_without_fields("iptables: 5", "iptables")]
    #[case::duration("iptables: { syncPeriod: 5 parsecs }", "iptables.syncPeriod")]
    #[case::negative("iptables: { minSyncPeriod: -5s }", "iptables.minSyncPeriod")]
    #[case::cidr("clusterCIDR: 10.244/16", "clusterCIDR")]
    #[case::detector("detectLocalMode: Magic", "detectLocalMode")]
    #[case::node_ports("nodePortAddresses: [everywhere]", "nodePortAddresses")]
    #[case::port("healthzBindAddress: localhost", "healthzBindAddress")]
    #[case::mode("mode: kernelspace", "mode")]
    #[case::gate("featureGates: { AllowServiceExternalIPs: 0 }", "featureGates.AllowServiceExternalIPs")]
    #[case::gates("featureGates: 5", "featureGates")]
    fn an_error_names_its_field(#[case] fields: &str, #[case] name: &str) {
        let error = format!("{:#}", parsed(fields).unwrap_err());
        assert!(error.contains(name), "{error}");
    }

    /// The first table of docs/operations.md below this heading, its first column.
    fn documented() -> Vec<&'static str> {
        let document = include_str!("../../docs/operations.md");
        let (_, section) = document.split_once("\n## Kube-proxy's configuration\n").unwrap();
        let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
        rows.skip(2).map(|row| row.split('|').nth(1).unwrap().trim()).collect()
    }

    #[test]
    fn every_field_that_has_a_meaning_is_documented_and_every_documented_one_exists() {
        let rows = documented();
        let words: Vec<&str> = rows
            .iter()
            .filter(|row| **row != "every other field")
            .flat_map(|row| row.split(" of the section").next().unwrap().split([',', ':', ' ']))
            .flat_map(|path| path.split('.'))
            .filter(|word| !word.is_empty())
            .collect();
        // What says which file it is.
        let head = ["apiVersion", "kind", "metadata", "mode"];
        for (path, use_) in FIELDS {
            let name = path.rsplit('.').next().unwrap();
            if !matches!(use_, Use::No(_)) && !head.contains(&path) {
                assert!(words.iter().any(|word| *word == name || path.starts_with(&format!("{word}."))), "{path}");
            }
        }
        for word in words {
            let is_part = |path: &str| path.split('.').any(|part| part == word);
            assert!(word == EXTERNAL_IPS_GATE || FIELDS.iter().any(|(path, _)| is_part(path)), "{word}");
        }
    }

    #[rstest]
    #[case::kind("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeletConfiguration\n")]
    #[case::version("apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration\n")]
    #[case::a_field_twice(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ''\nmode: ''\n"
    )]
    #[case::no_object("5")]
    #[case::nothing("")]
    fn another_file_is_refused(#[case] text: &str) {
        assert!(parse(text).is_err());
    }

    #[rstest]
    #[case::nothing("", None)]
    #[case::no_limit("conntrack: { maxPerCore: 0, min: 200000 }", None)]
    #[case::a_core("conntrack: { maxPerCore: 100000 }", Some(400_000))]
    #[case::at_least("conntrack: { maxPerCore: 1000, min: 9000 }", Some(9000))]
    #[case::kube_proxys_least("conntrack: { maxPerCore: 1000 }", Some(131_072))]
    #[case::kube_proxys_number_a_core("conntrack: { min: 5 }", Some(131_072))]
    fn the_flow_table_has_room_for_what_kube_proxy_has(#[case] fields: &str, #[case] expected: Option<u32>) {
        let file = File(serde_saphyr::from_str(&format!("{HEAD}{fields}")).unwrap());
        assert_eq!(file.flow_table_size(4).unwrap(), expected);
    }

    #[test]
    fn a_flow_table_of_an_impossible_size_is_an_error_that_names_the_fields() {
        let error = parsed("conntrack: { maxPerCore: 4000000000 }").unwrap_err();
        assert!(format!("{error:#}").starts_with("conntrack.maxPerCore, conntrack.min: "), "{error:#}");
    }

    #[rstest]
    #[case(1, 131_072)]
    #[case(8, 262_144)]
    #[case(128, 1 << 20)]
    fn the_flow_table_grows_with_the_cores(#[case] cores: u32, #[case] expected: u32) {
        assert_eq!(default_flow_table_size(cores), expected);
    }
}
