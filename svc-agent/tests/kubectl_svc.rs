//! deploy/kubectl-svc with a kubectl that notes what it is asked.
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use rstest::rstest;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubectl-svc");

/// Agents on two nodes; `exec` in the second one's pod ends with 3.
const KUBECTL: &str = r#"#!/bin/sh
printf '%s|' "$@" >>"$LOG"
printf '\n' >>"$LOG"
for word in "$@"; do
    case $word in
        get) printf '%s' "$AGENTS"; exit ;;
        pod-b) exit 3 ;;
    esac
done
printf 'answer\n'
"#;

const AGENTS: &str = "pod-a node-a\npod-b node-b\n";

/// What came of it, and what kubectl was asked.
fn svc(agents: &str, arguments: &[&str]) -> (Output, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let kubectl = directory.path().join("kubectl");
    fs::write(&kubectl, KUBECTL).unwrap();
    fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).unwrap();
    let log = directory.path().join("log");
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(Path::new(SCRIPT));
    let output = command.args(arguments).env("PATH", path).env("LOG", &log).env("AGENTS", agents).output().unwrap();
    let asked = fs::read_to_string(log).unwrap_or_default().lines().map(str::to_owned).collect();
    (output, asked)
}

#[rstest]
#[case::the_first_node(&["services", "-n", "a b"], "--namespace|kube-system|exec|pod-a|--|svc-agent|services|-n|a b|", 0)]
#[case::a_chosen_one(&["--node", "node-b", "maps"], "--namespace|kube-system|exec|pod-b|--|svc-agent|maps|", 3)]
#[case::another_cluster(
    &["--context=c", "--agent-namespace", "net", "flows", "--node", "x"],
    "--context|c|--namespace|net|exec|pod-a|--|svc-agent|flows|--node|x|",
    0
)]
#[case::on_a_terminal(&["top"], "--namespace|kube-system|exec|--stdin|--tty|pod-a|--|svc-agent|top|", 0)]
fn the_agent_on_a_node_is_asked(#[case] arguments: &[&str], #[case] asked: &str, #[case] code: i32) {
    let (output, log) = svc(AGENTS, arguments);
    assert_eq!(log.last().map(String::as_str), Some(asked));
    assert_eq!(output.status.code(), Some(code), "svc-agent's own exit code");
}

#[test]
fn all_nodes_are_asked_and_the_worst_exit_code_is_told() {
    let (output, log) = svc(AGENTS, &["--all-nodes", "check"]);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "== node-a\nanswer\n== node-b\n");
    assert_eq!((log.len(), output.status.code()), (3, Some(3)));
}

#[rstest]
#[case::no_agents("", &["services"], "no pod with the label app.kubernetes.io/name in (svc, svc-agent) runs in the namespace kube-system")]
#[case::no_such_node(AGENTS, &["--node", "node-c", "services"], "--node node-c: no agent runs there; agents run on: node-a node-b")]
#[case::both(AGENTS, &["--node", "a", "--all-nodes", "services"], "exclude each other")]
#[case::unknown_flag(AGENTS, &["--nodes", "services"], "--nodes is no flag of kubectl svc")]
#[case::no_value(AGENTS, &["--node"], "--node needs a value")]
#[case::no_subcommand(AGENTS, &[], "Usage: kubectl svc")]
#[case::a_screen_for_all(AGENTS, &["--all-nodes", "top"], "top shows one node")]
fn what_cannot_be_done_is_told(#[case] agents: &str, #[case] arguments: &[&str], #[case] told: &str) {
    let (output, _) = svc(agents, arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains(told), "{errors}");
    assert_eq!(output.status.code(), Some(2));
}
