//! The chart, in all its settings.
use std::fs;
use std::process::Command;

use rstest::rstest;
use serde_json::{Value, json};
use svc_lab::binaries;
use svc_tests::cluster::Cluster;

use crate::installed::{all, find, path};
use crate::render::{helm, kustomize};

/// Each setting, as `--set-json` takes it, and an argument, a part of the DaemonSet's JSON, that it leads to.
const SETTINGS: &[(&str, &str)] = &[
    (
        r#"image={"repository":"registry.example/svc","tag":"1.2.3","pullPolicy":"Always"}"#,
        r#""registry.example/svc:1.2.3""#,
    ),
    (r#"image.pullSecrets=[{"name":"key"}]"#, r#""imagePullSecrets":[{"name":"key"}]"#),
    (
        r#"apiServer.urls=["https://192.0.2.1:6443","https://[2001:db8::1]:6443"]"#,
        r#""--api-server=https://[2001:db8::1]:6443""#,
    ),
    (r#"apiServer.kubeletKubeconfig="/var/lib/kubelet/kubeconfig""#, r#""path":"/var/lib/kubelet/kubeconfig""#),
    (r#"kubeProxyConfigMap="kube-proxy""#, r#""--config=/var/lib/kube-proxy/config.conf""#),
    (r#"clusterCIDR=["10.244.0.0/16","fd00::/56"]"#, r#""--cluster-cidr=10.244.0.0/16,fd00::/56""#),
    (r#"detectLocalMode="NodeCIDR""#, r#""--detect-local-mode=NodeCIDR""#),
    (r#"nodePortAddresses=["192.0.2.0/24","2001:db8::/32"]"#, r#""--nodeport-addresses=192.0.2.0/24,2001:db8::/32""#),
    (r#"nodePortAddresses=["primary"]"#, r#""--nodeport-addresses=primary""#),
    (r#"uplinks=["eth0","eth1"]"#, r#""--uplink=eth1""#),
    (r#"socketLB="host""#, r#""--socket-lb=host""#),
    (r#"xdp="generic""#, r#""--xdp=generic""#),
    (r#"tc="clsact""#, r#""--tc=clsact""#),
    ("terminatePodUDPSockets=false", r#""add":["BPF","NET_ADMIN","PERFMON"]"#),
    ("takeOver=true", r#""--take-over""#),
    (r#"extraArgs=["--flow-table-size=1000000","--masquerade-all"]"#, r#""--flow-table-size=1000000""#),
    (r#"healthzBindAddress="127.0.0.1:10356""#, r#""host":"127.0.0.1""#),
    (r#"healthzBindAddress="[::]:10356""#, r#""containerPort":10356"#),
    (r#"metricsBindAddress="0.0.0.0:10249""#, r#""containerPort":10249"#),
    (r#"log={"format":"json","level":"debug"}"#, r#""--log-format=json""#),
    (r#"cgroupHostPath="/sys/fs/cgroup/unified""#, r#""path":"/sys/fs/cgroup/unified""#),
    (r#"netnsHostPath="/var/run/netns""#, r#""path":"/var/run/netns""#),
    ("resources=null", r#""name":"agent""#),
    (r#"updateStrategy={"type":"OnDelete","rollingUpdate":null}"#, r#""type":"OnDelete""#),
    ("terminationGracePeriodSeconds=30", r#""terminationGracePeriodSeconds":30"#),
    (r#"priorityClassName="system-cluster-critical""#, r#""priorityClassName":"system-cluster-critical""#),
    (r#"nodeSelector={"svc":"here"}"#, r#""svc":"here""#),
    (r#"tolerations=[{"key":"a","operator":"Exists"}]"#, r#""tolerations":[{"key":"a","operator":"Exists"}]"#),
    (r#"affinity={"nodeAffinity":{}}"#, r#""affinity":{"nodeAffinity":{}}"#),
    (r#"podAnnotations={"a":"b"}"#, r#""annotations":{"a":"b""#),
    (r#"podLabels={"a":"b"}"#, r#""labels":{"a":"b""#),
];

/// What only Helm says of an object.
fn without_helms_labels(mut objects: Vec<Value>) -> Vec<Value> {
    for object in &mut objects {
        let labels = object["metadata"]["labels"].as_object_mut().unwrap();
        for label in ["app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart"] {
            assert!(labels.remove(label).is_some(), "no {label} on a {}", object["kind"]);
        }
    }
    objects
}

#[test]
fn the_chart_as_it_comes_is_the_kustomize_base() {
    assert_eq!(without_helms_labels(helm(&[]).unwrap()), kustomize("kustomize/base"));
}

#[test]
fn every_setting_of_the_chart_is_tried_here() {
    let text = fs::read_to_string(path("chart/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    for (name, setting) in schema["properties"].as_object().unwrap() {
        let inner = setting["properties"].as_object().into_iter().flatten().map(|(inner, _)| format!("{name}.{inner}"));
        let is_tried = |wanted: &str| {
            let whole = |set: &str| {
                wanted.split_once('.').is_some_and(|(outer, inner)| {
                    set.starts_with(&format!("{outer}={{")) && set.contains(&format!("\"{inner}\""))
                })
            };
            SETTINGS.iter().any(|(set, _)| set.starts_with(&format!("{wanted}=")) || whole(set))
        };
        let wanted: Vec<String> =
            if setting.get("properties").is_some() { inner.collect() } else { vec![name.clone()] };
        for wanted in wanted.iter().filter(|wanted| *wanted != "global") {
            assert!(is_tried(wanted), "{wanted}");
        }
    }
}

#[test]
fn the_linter_finds_nothing() {
    let mut lint = Command::new(svc_lab::control_plane::helm_binary().unwrap());
    let output = lint.args(["lint", "--strict", &path("chart")]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// By its strict validation, no field unknown.
#[test]
fn api_server_and_agent_take_the_chart_in_all_its_settings() {
    let mut cluster = Cluster::without_agents();
    let file = cluster.lab.directory().join("chart.json");
    let mut items = Vec::new();
    for (index, (setting, expected)) in SETTINGS.iter().enumerate() {
        let mut objects = helm(&["--set-json", setting]).unwrap();
        let daemon_set = find(&objects, "DaemonSet");
        assert!(daemon_set.to_string().contains(expected), "{setting}: {daemon_set}");
        assert_taken_by_agent(daemon_set);
        for object in &mut objects {
            object["metadata"]["name"] = format!("svc-agent-{index}").into();
        }
        items.extend(objects);
    }
    let count = items.len();
    fs::write(&file, json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()).unwrap();
    let (control_plane, lab) = cluster.control_plane();
    let arguments = ["create", "--dry-run=server", "--validate=strict", "-f", file.to_str().unwrap()];
    let told = control_plane.kubectl(lab, &arguments).unwrap();
    assert_eq!(told.lines().filter(|line| line.ends_with("created (server dry run)")).count(), count, "{told}");
}

/// Every container's arguments are understood: what it misses then is privilege.
fn assert_taken_by_agent(daemon_set: &Value) {
    for kind in ["initContainers", "containers"] {
        for container in all(&daemon_set["spec"]["template"]["spec"][kind]) {
            let arguments: Vec<&str> = all(&container["args"]).map(|word| word.as_str().unwrap()).collect();
            if arguments[0] == "mount" {
                continue;
            }
            let mut command = Command::new(binaries::lab().unwrap());
            command.args(["contain", "--root", "/", "--capabilities", "PERFMON", "--"]).arg(binaries::agent().unwrap());
            let output = command.args(&arguments).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(told.contains("needs root, or the capabilities"), "{arguments:?}: {told}");
        }
    }
}

#[rstest]
#[case::unknown("nodePortAdresses=[]", "nodePortAdresses")]
#[case::mode(r#"detectLocalMode="nodecidr""#, "/detectLocalMode")]
#[case::no_url(r#"apiServer.urls=["192.0.2.1:6443"]"#, "/apiServer/urls/0")]
#[case::no_cidr(r#"clusterCIDR=["10.244.0.0"]"#, "/clusterCIDR/0")]
#[case::text_for_a_list(r#"clusterCIDR="10.244.0.0/16""#, "/clusterCIDR")]
#[case::socket_lb(r#"socketLB="true""#, "/socketLB")]
#[case::too_short_for_the_last_write("terminationGracePeriodSeconds=5", "/terminationGracePeriodSeconds")]
#[case::no_port(r#"healthzBindAddress="0.0.0.0""#, "/healthzBindAddress")]
fn a_setting_that_cannot_be_is_refused_by_its_name(#[case] setting: &str, #[case] name: &str) {
    let error = helm(&["--set-json", setting]).unwrap_err();
    assert!(error.contains(name), "{error}");
}
