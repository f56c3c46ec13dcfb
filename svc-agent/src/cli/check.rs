//! `svc-agent check`: whether this machine is fit for `svc-agent run` with the same flags.
use std::path::Path;

use anyhow::Context as _;
use kube::config::Kubeconfig;

use super::print::{self, Format};
use super::run::{self, Effective};
use crate::check::{Finding, Grade, kernel, kube_proxy, network, places};

const PROC: &str = "/proc";
/// Where a pod finds what its service account is known by.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Args {
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,

    #[command(flatten, next_help_heading = "As for svc-agent run")]
    run: run::Args,
}

/// True where nothing failed.
///
/// # Errors
/// Where stdout does not take it.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let findings = findings(&args.run);
    match args.output {
        Format::Table => print::text(&text(&findings))?,
        format => print::data(format, &findings)?,
    }
    Ok(findings.iter().all(|finding| finding.result != Grade::Failed))
}

/// A remedy under what it is for: beside it, lines would be too long to read.
fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let lines = findings.iter().map(|finding| {
        let Finding { result, check, found, remedy } = finding;
        let remedy =
            remedy.as_ref().map_or_else(String::new, |remedy| format!("{:10}{:width$}  -> {remedy}\n", "", ""));
        format!("{:10}{check:width$}  {found}\n{remedy}", result.label())
    });
    lines.map(|line| print::escape(&line)).collect()
}

/// Those that explain others come first.
pub(super) fn findings(args: &run::Args) -> Vec<Finding> {
    let proc = Path::new(PROC);
    let mut findings = vec![kernel::version(proc), kernel::capabilities(), kernel::jit(proc)];
    findings.push(places::cgroup(args.cgroup.as_deref()));
    findings.push(places::bpffs(&args.bpffs));
    findings.push(places::pins(&args.bpffs));
    findings.extend(kernel::programs(args.tc));
    let (found, uplinks) = network::uplinks(&args.uplinks);
    findings.push(found);
    if !uplinks.is_empty() {
        findings.push(network::mtu(&uplinks));
        findings.push(network::forwarding(proc, &uplinks));
        findings.push(network::rp_filter(proc, &uplinks));
        findings.push(network::route_localnet(proc, &uplinks));
    }
    findings.push(network::source_ports());
    let (found, effective) = configuration(args);
    findings.push(found);
    if let Some(effective) = effective {
        findings.push(source(args, &effective));
        for (check, flag, address) in [
            ("healthz_port", "--healthz-bind-address", effective.healthz_bind_address),
            ("metrics_port", "--metrics-bind-address", effective.metrics_bind_address),
        ] {
            findings.push(places::port(check, flag, address, proc));
        }
    }
    findings.push(kube_proxy::process(proc));
    findings.push(kube_proxy::rules(proc));
    findings
}

fn configuration(args: &run::Args) -> (Finding, Option<Effective>) {
    const CHECK: &str = "configuration";
    let read = || {
        let file = args.config.as_deref().map(run::read_config).transpose()?.map(|(file, _)| file);
        let effective = Effective::new(args, file.unwrap_or_default())?;
        effective.pod_detector()?;
        Ok::<_, anyhow::Error>(effective)
    };
    match read() {
        Ok(effective) => {
            let found = match &args.config {
                Some(path) => format!("node {}, flags and {}", effective.node_name, path.display()),
                None => format!("node {}, flags alone", effective.node_name),
            };
            (Finding::ok(CHECK, found), Some(effective))
        }
        Err(error) => (Finding::failed(CHECK, format!("{error:#}"), "see `svc-agent run --help`"), None),
    }
}

/// Whether what names the Services' source can be read; nobody is asked for them.
fn source(args: &run::Args, effective: &Effective) -> Finding {
    const CHECK: &str = "source";
    let (found, remedy) = if let Some(directory) = &args.manifests {
        let read = std::fs::read_dir(directory).with_context(|| format!("--manifests {}", directory.display()));
        (read.map(|_| format!("manifests in {}", directory.display())), "name a directory that can be read")
    } else if let Some(path) = &effective.kubeconfig {
        let read = Kubeconfig::read_from(path).with_context(|| format!("--kubeconfig {}", path.display()));
        (read.map(|_| format!("the API server of {}", path.display())), "name a kubeconfig that can be read")
    } else {
        let read = std::fs::metadata(TOKEN).with_context(|| format!("no flag names a source, and {TOKEN}"));
        (read.map(|_| "the API server, by the pod's service account".to_owned()), "give --kubeconfig or --manifests")
    };
    match found {
        Ok(found) => Finding::ok(CHECK, found),
        Err(error) => Finding::failed(CHECK, format!("{error:#}"), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_stands_under_what_it_is_for() {
        let findings = [
            Finding::ok("kernel", "Linux 6.12.0"),
            Finding::warning("forwarding", "off", "sysctl -w \u{1b}[2J"),
            Finding::failed("bpffs", "not mounted", "mount it"),
        ];
        insta::assert_snapshot!(text(&findings), @r"
        ok        kernel      Linux 6.12.0
        warning   forwarding  off
                              -> sysctl -w \u001b[2J
        failed    bpffs       not mounted
                              -> mount it
        ");
    }

    #[test]
    fn fields_have_stable_names() {
        let finding = Finding::warning("mtu", "eth0 1500", "none");
        let json = serde_json::to_string(&finding).unwrap();
        assert_eq!(json, r#"{"result":"warning","check":"mtu","found":"eth0 1500","remedy":"none"}"#);
    }
}
