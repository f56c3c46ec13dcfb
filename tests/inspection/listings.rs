//! Lists, and what is told of a node's state, with the agent alive and dead.
use serde_json::{Value, json};
use svc_lab::client::Options;
use svc_lab::topology::{NODES, OUTSIDE};
use svc_tests::cluster::{Cluster, all_backends, service};

use super::{flow_cells, json as ask};

fn rows(cluster: &Cluster, arguments: &[&str]) -> Vec<Value> {
    let (code, rows) = ask(cluster, arguments);
    assert_eq!(code, 0, "{rows}");
    rows.as_array().unwrap().clone()
}

#[test]
fn a_client_with_affinity_is_listed_with_its_backend() {
    let mut cluster = Cluster::with_manifests();
    let [mut sticky, slice] = service("sticky", "10.96.0.95", &["a1"]);
    sticky["spec"]["sessionAffinity"] = "ClientIP".into();
    cluster.change(|manifests| [sticky, slice].into_iter().for_each(|object| manifests.put(object)));
    cluster.expect_soon(OUTSIDE, "http://10.96.0.95/", &["a1"]);
    let listed = rows(&cluster, &["affinity", "-n", "default"]);
    let of_client: Vec<&Value> = listed.iter().filter(|row| row["client"] == "172.31.0.99").collect();
    assert_eq!(of_client.len(), 1, "{listed:?}");
    let told = ["service", "backend", "timeoutSeconds", "holds"].map(|field| of_client[0][field].clone());
    assert_eq!(told, [json!("sticky"), json!("10.244.1.11:9376"), json!(10_800), json!(true)]);
    assert_eq!(rows(&cluster, &["affinity", "-n", "other"]), Vec::<Value>::new());
}

#[test]
fn a_list_has_the_namespace_that_is_asked_for() {
    let cluster = Cluster::with_manifests();
    cluster.expect_balanced(OUTSIDE, &Options::to("udp://172.31.0.11:30007"), &all_backends());
    for list in ["services", "backends", "flows"] {
        let all = rows(&cluster, &[list, "-A"]);
        assert!(!all.is_empty(), "{list}");
        assert_eq!(rows(&cluster, &[list, "-n", "default"]).len(), all.len(), "{list}");
        assert_eq!(rows(&cluster, &[list, "-n", "other"]), Vec::<Value>::new(), "{list}");
    }
}

#[test]
fn every_map_that_may_be_full_is_listed_with_its_size() {
    let cluster = Cluster::with_manifests();
    let maps = rows(&cluster, &["maps"]);
    let of = |name: &str| maps.iter().find(|row| row["map"] == name).unwrap();
    assert_eq!(
        (&of("frontends")["maxEntries"], &of("frontends")["flag"]),
        (&json!(131_072), &json!("--max-frontends"))
    );
    assert_eq!(of("flows")["maxEntries"], json!(flow_cells()));
}

#[test]
fn status_says_that_a_dead_agent_is_why_nothing_changes() {
    let mut cluster = Cluster::with_manifests();
    let status = |cluster: &Cluster| ask(cluster, &["status", "--verbose"]).1;
    let alive = status(&cluster);
    assert_eq!((&alive["degraded"], &alive["details"]["agent"]["running"]), (&json!([]), &json!(true)), "{alive}");
    assert_eq!(alive["details"]["modes"]["socketLb"], "on");
    assert_eq!(alive["details"]["agent"]["healthz"], 200);
    assert!(alive["details"]["agent"]["lastSync"].as_f64().unwrap() > 0.0);
    let hooks = |status: &Value| status["hooks"].as_array().unwrap().len();
    let programs = alive["details"]["programs"].as_array().unwrap();
    let places: usize = programs.iter().map(|program| program["hooks"].as_array().unwrap().len()).sum();
    assert_eq!(places, hooks(&alive), "each hook has a program that the kernel tells of");
    cluster.kill_agent(&NODES[0]);
    let dead = status(&cluster);
    assert_eq!(dead["details"]["agent"]["running"], json!(false));
    let why = dead["degraded"].as_array().unwrap();
    assert!(why.len() == 1 && why[0].as_str().unwrap().starts_with("no agent answers"), "{why:?}");
    assert_eq!(hooks(&dead), hooks(&alive));
}
