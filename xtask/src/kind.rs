//! The quick start of deploy/kind/README.md.
use std::process::Command;

use anyhow::{Result, bail};

use crate::step::{output, root, shown};

const IMAGE: &str = "svc-agent:dev";
const CLUSTER: &str = "svc";
const CONTEXT: &str = "kind-svc";

/// What it takes, how that is asked, and where it is to be had.
const NEEDED: [(&str, &[&str], &str); 3] = [
    ("docker", &["info"], "install Docker (https://docs.docker.com/engine/install) and start its daemon"),
    ("kind", &["version"], "go install sigs.k8s.io/kind@latest"),
    ("kubectl", &["version", "--client"], "install kubectl (https://kubernetes.io/docs/tasks/tools)"),
];

/// Build the image, and run svc in a kind cluster of its own.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    let missing = missing(|program, arguments| output(Command::new(program).args(arguments)).is_some());
    if !missing.is_empty() {
        bail!("{}", missing.join("\n"));
    }
    for arguments in commands() {
        let [program, arguments @ ..] = &arguments[..] else { continue };
        println!("$ {program} {}", arguments.join(" "));
        shown(Command::new(program).args(arguments).current_dir(root()))?;
    }
    Ok(())
}

/// A line for each program that does not answer.
fn missing(answers: impl Fn(&str, &[&str]) -> bool) -> Vec<String> {
    let missing = NEEDED.iter().filter(|(program, arguments, _)| !answers(program, arguments));
    missing.map(|(program, arguments, remedy)| format!("`{program} {}` fails: {remedy}", arguments.join(" "))).collect()
}

/// Those of the README, and the wait for their outcome.
fn commands() -> Vec<Vec<&'static str>> {
    let wait = ["kubectl", "--context", CONTEXT];
    vec![
        vec!["docker", "build", "-f", "deploy/Dockerfile", "-t", IMAGE, "."],
        vec!["kind", "create", "cluster", "--config", "deploy/kind/cluster.yaml"],
        vec!["kind", "load", "docker-image", IMAGE, "--name", CLUSTER],
        vec!["kubectl", "--context", CONTEXT, "apply", "-k", "deploy/kind"],
        [&wait[..], &["-n", "kube-system", "rollout", "status", "daemonset/svc-agent", "--timeout=5m"]].concat(),
        [&wait[..], &["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=5m"]].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_program_that_is_missing_has_a_line_with_its_remedy() {
        let lines = missing(|program, _| program == "kubectl");
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("`docker info` fails: ") && lines[1].contains("go install"), "{lines:?}");
        assert!(missing(|_, _| true).is_empty());
    }

    #[test]
    fn the_readme_has_the_commands_that_are_run() {
        let readme = std::fs::read_to_string(root().join("deploy/kind/README.md")).unwrap();
        for command in &commands()[..4] {
            assert!(readme.contains(&command.join(" ")), "{command:?}");
        }
    }
}
