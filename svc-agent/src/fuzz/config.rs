//! KubeProxyConfiguration files.
use clap::Parser as _;
use proptest::prelude::*;
use serde_json::Value;

use super::campaign;
use super::mutation::{mutations, names, texts};
use crate::cli::run::{Args, Effective};
use crate::cli::{Cli, Command};
use crate::kube_proxy_config::parse;

/// Every field of kube-proxy's that has a meaning here, and some that have none.
const FILE: &str = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
featureGates: {AllowServiceExternalIPs: false, SupportIPVSProxyMode: true}
clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 5, burst: 10, contentType: application/json}
logging: {format: json, flushFrequency: 5s, verbosity: 2, options: {json: {infoBufferSize: '0'}}}
hostnameOverride: node-a
bindAddress: '::'
healthzBindAddress: 192.0.2.1:10256
metricsBindAddress: '[::1]:10249'
bindAddressHardFail: true
enableProfiling: false
mode: nftables
iptables: {masqueradeBit: 14, masqueradeAll: false, localhostNodePorts: true, syncPeriod: 30s, minSyncPeriod: 1s}
ipvs: {scheduler: rr, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpTimeout: 0s}
nftables: {masqueradeBit: 14, masqueradeAll: true, syncPeriod: 1m30s, minSyncPeriod: 500ms}
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
nodePortAddresses: [192.0.2.0/24, '2001:db8::/32']
oomScoreAdj: -999
conntrack: {maxPerCore: 32768, tcpEstablishedTimeout: 24h, tcpCloseWaitTimeout: 1h, udpTimeout: 30s, udpStreamTimeout: 2m}
configSyncPeriod: 15m
portRange: ''
";

fn arguments() -> Args {
    match Cli::try_parse_from(["svc-agent", "run", "--manifests", "/nowhere"]).unwrap().command {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

/// All that the agent makes of a file before it touches anything; returns what is wrong with it.
fn take(args: &Args, text: &str) -> Result<(), String> {
    let (config, warnings) = parse(text).map_err(|error| format!("{error:#}"))?;
    assert!(warnings.iter().all(|warning| warning.contains(": ")), "{warnings:?}");
    let effective = Effective::new(args, config).map_err(|error| format!("{error:#}"))?;
    effective.pod_detector().map_err(|error| format!("{error:#}"))?;
    serde_json::from_str::<Value>(&effective.configz()).expect("/configz is JSON");
    Ok(())
}

fn document() -> Value {
    serde_saphyr::from_str(FILE).unwrap()
}

#[test]
fn the_file_that_is_changed_is_a_right_one() {
    take(&arguments(), FILE).unwrap();
}

#[test]
fn config_with_one_change_is_taken_or_the_error_names_its_field() {
    let args = arguments();
    campaign("--config", &mutations(), |mutation| {
        let mut document = document();
        let ways = mutation.apply(&mut document);
        // JSON is YAML, and whatever a text holds, it is read as what it is.
        let Err(error) = take(&args, &document.to_string()) else { return Ok(()) };
        prop_assert!(!error.contains('\n'), "more than a line: {error}");
        let named = ways.iter().any(|way| {
            // Below these are lists and maps of a field.
            let field: Vec<&str> =
                way.iter().map(String::as_str).take_while(|name| name.parse::<u8>().is_err()).collect();
            (1..=field.len()).rev().any(|length| names(&error, &field[..length].join(".")))
        });
        // Of two fields that do not go together the flags are named.
        prop_assert!(named || error.contains("--"), "{ways:?} is not named: {error}");
        Ok(())
    });
}

#[test]
fn config_with_many_changes_costs_an_error_at_most() {
    let args = arguments();
    campaign("--config", &prop::collection::vec(mutations(), 2..8), |mutations| {
        let mut document = document();
        mutations.iter().for_each(|mutation| drop(mutation.apply(&mut document)));
        let _ = take(&args, &serde_saphyr::to_string(&document).unwrap());
        let _ = take(&args, &document.to_string());
        Ok(())
    });
}

#[test]
fn config_of_any_depth_is_an_error() {
    for opening in ["[", "{a: ", "- ", "a:\n "] {
        assert!(take(&arguments(), &opening.repeat(100_000)).is_err(), "{opening:?}");
    }
}

#[test]
fn config_of_any_bytes_costs_an_error_at_most() {
    let args = arguments();
    campaign("--config", &texts(FILE.to_owned()), |text| {
        let _ = take(&args, &text);
        Ok(())
    });
}
