//! The real kube-proxy on a node of the lab, in svc-agent's place.
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::agent::{log_tail, wait_until_healthy};
use crate::control_plane::{ControlPlane, kube_proxy_binary};
use crate::process::Process;
use crate::topology::{CLUSTER_CIDRS, Lab, Node};

/// For ten thousand Services it takes minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// How it programs the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
        }
    }
}

/// Its rules outlive it, as they do on a real node.
pub struct KubeProxy {
    process: Process,
    log: PathBuf,
}

impl KubeProxy {
    /// Starts it, and waits until it says that the kernel knows everything. `node_port_addresses` are CIDRs, or nothing for
    /// the mode's own default.
    pub fn start(
        lab: &Lab,
        node: &Node,
        control_plane: &ControlPlane,
        mode: Mode,
        node_port_addresses: &[&str],
    ) -> Result<Self> {
        let name = format!("kube-proxy-{}", node.name);
        let configuration = lab.directory().join(format!("{name}.json"));
        let kubeconfig = control_plane.agent_kubeconfig().display().to_string();
        let text = configuration_of(node, &kubeconfig, mode, node_port_addresses).to_string();
        fs::write(&configuration, text)?;
        let (path, log) = lab.log(&name)?;
        let mut command = Command::new(kube_proxy_binary()?);
        command.arg("--config").arg(configuration).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut kube_proxy = KubeProxy { process: lab.spawn(node.name, command)?, log: path };
        let KubeProxy { process, log } = &mut kube_proxy;
        wait_until_healthy("kube-proxy", process, log, lab.namespace(node.name)?, PATIENCE)?;
        Ok(kube_proxy)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Takes its rules away, as `kube-proxy --cleanup` does on a real node.
    pub fn cleanup(lab: &Lab, node: &Node) -> Result<()> {
        let mut command = Command::new(kube_proxy_binary()?);
        command.arg("--cleanup").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = lab.spawn(node.name, command)?.output()?;
        if !output.status.success() {
            bail!("kube-proxy --cleanup ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }
}

fn configuration_of(node: &Node, kubeconfig: &str, mode: Mode, node_port_addresses: &[&str]) -> Value {
    let mut configuration = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.name(),
        "clientConnection": { "kubeconfig": kubeconfig },
        "hostnameOverride": node.name,
        "clusterCIDR": CLUSTER_CIDRS,
        // The table's size can only be set in the machine's own network namespace.
        "conntrack": { "maxPerCore": 0, "min": 0 },
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "nftables": { "minSyncPeriod": "100ms" },
        "iptables": { "minSyncPeriod": "100ms" },
    });
    if !node_port_addresses.is_empty() {
        configuration["nodePortAddresses"] = json!(node_port_addresses);
    }
    configuration
}
