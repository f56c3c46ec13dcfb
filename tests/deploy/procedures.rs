//! The commands of docs/operations.md, as they stand there. What waits for a rollout has nobody here who would roll out.
use serde_json::{Value, json};
use svc_tests::cluster::Cluster;

use crate::installed::path;

fn words(command: &str) -> Vec<String> {
    let words = command.split(' ').filter(|word| !word.is_empty());
    words.map(|word| word.strip_prefix("deploy/").map_or_else(|| word.trim_matches('\'').to_owned(), path)).collect()
}

/// Runs a command that the document has, and returns what it says.
fn run(cluster: &mut Cluster, command: &str) -> String {
    let document = include_str!("../../docs/operations.md");
    assert!(document.contains(command), "docs/operations.md does not say: {command}");
    let words = words(command);
    let [program, arguments @ ..] = &words[..] else { panic!("an empty command") };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (control_plane, lab) = cluster.control_plane();
    match program.as_str() {
        "kubectl" => control_plane.kubectl(lab, &arguments).unwrap(),
        "helm" => control_plane.helm(lab, &arguments).unwrap(),
        _ => panic!("{program}"),
    }
}

/// The names of what the cluster has of svc's.
fn objects(cluster: &mut Cluster) -> Vec<String> {
    let (control_plane, lab) = cluster.control_plane();
    let kinds = "daemonsets,serviceaccounts,clusterroles,clusterrolebindings";
    let listed = control_plane.kubectl(lab, &["get", kinds, "-n", "kube-system", "-o", "name"]).unwrap();
    listed.lines().filter(|name| name.contains("/svc") || name.contains("cleanup")).map(str::to_owned).collect()
}

fn daemon_set(cluster: &mut Cluster, name: &str) -> Value {
    let (control_plane, lab) = cluster.control_plane();
    let arguments = ["get", "daemonset", name, "-n", "kube-system", "-o", "json"];
    serde_json::from_str(&control_plane.kubectl(lab, &arguments).unwrap()).unwrap()
}

#[test]
fn helm_installs_with_take_over_upgrades_without_and_leaves_nothing() {
    let cluster = &mut Cluster::without_agents();
    run(cluster, "helm install svc deploy/chart --namespace kube-system --set takeOver=true");
    assert_eq!(objects(cluster).len(), 4, "{:?}", objects(cluster));
    let takes_over = |cluster: &mut Cluster| daemon_set(cluster, "svc-agent").to_string().contains("--take-over");
    assert!(takes_over(cluster));
    run(cluster, "helm upgrade svc deploy/chart --namespace kube-system --set takeOver=false");
    assert!(!takes_over(cluster));
    run(cluster, "helm uninstall svc --namespace kube-system");
    assert_eq!(objects(cluster), Vec::<String>::new());
    run(cluster, "helm install svc deploy/chart --namespace kube-system --set 'clusterCIDR={10.244.0.0/16}'");
    assert!(daemon_set(cluster, "svc-agent").to_string().contains("--cluster-cidr=10.244.0.0/16"));
}

#[test]
fn kubectl_installs_uninstalls_and_leaves_nothing() {
    let cluster = &mut Cluster::without_agents();
    run(cluster, "kubectl apply -k deploy/kustomize/base");
    run(cluster, "kubectl -n kube-system delete daemonset svc-agent");
    run(cluster, "kubectl apply -k deploy/give-back");
    assert!(daemon_set(cluster, "svc-cleanup").to_string().contains("--keep-flows"));
    run(cluster, "kubectl apply -k deploy/uninstall");
    assert!(!daemon_set(cluster, "svc-cleanup").to_string().contains(r#"["cleanup","--keep-flows"]"#));
    run(cluster, "kubectl delete -k deploy/uninstall");
    run(cluster, "kubectl apply -k deploy/kube-proxy");
    run(cluster, "kubectl delete -k deploy/kube-proxy");
    run(cluster, "kubectl apply -k deploy/kustomize/base");
    run(cluster, "kubectl delete -k deploy/kustomize/base");
    assert_eq!(objects(cluster), Vec::<String>::new());
}

#[test]
fn kube_proxy_is_stopped_and_started_by_its_node_selector() {
    let cluster = &mut Cluster::without_agents();
    let labels = json!({ "k8s-app": "kube-proxy" });
    let selector = json!({ "kubernetes.io/os": "linux" });
    let kube_proxy = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "kube-proxy", "namespace": "kube-system" },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": { "nodeSelector": selector, "containers": [{ "name": "kube-proxy", "image": "kube-proxy" }] },
            },
        },
    });
    let file = cluster.lab.directory().join("kube-proxy.json");
    std::fs::write(&file, kube_proxy.to_string()).unwrap();
    let (control_plane, lab) = cluster.control_plane();
    control_plane.kubectl(lab, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    let selected =
        |cluster: &mut Cluster| daemon_set(cluster, "kube-proxy")["spec"]["template"]["spec"]["nodeSelector"].clone();
    run(cluster, "kubectl -n kube-system patch daemonset kube-proxy --patch-file deploy/kube-proxy/stop.yaml");
    assert_eq!(selected(cluster)["svc/kube-proxy"], "stopped");
    run(cluster, "kubectl -n kube-system patch daemonset kube-proxy --patch-file deploy/kube-proxy/start.yaml");
    assert_eq!(selected(cluster), selector);
}
