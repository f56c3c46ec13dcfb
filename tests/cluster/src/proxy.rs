//! What serves Services: svc or kube-proxy, each by a DaemonSet, or nothing.
use anyhow::Result;
use clap::ValueEnum;

use crate::programs::source;
use crate::state::Cluster;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Proxy {
    /// svc, from deploy/.
    Svc,
    /// kube-proxy in nftables mode, as kubeadm installs it.
    #[value(name = "kube-proxy")]
    Kube,
    /// Nothing; the cluster has no DNS then.
    None,
}

impl Proxy {
    pub(crate) fn daemon_set(self) -> Option<&'static str> {
        match self {
            Proxy::Svc => Some("svc-agent"),
            Proxy::Kube => Some("kube-proxy"),
            Proxy::None => None,
        }
    }

    /// The archive of its image.
    pub(crate) fn image(self) -> Option<&'static str> {
        match self {
            Proxy::Svc => Some("svc-agent.tar"),
            Proxy::Kube => Some("kube-proxy.tar"),
            Proxy::None => None,
        }
    }

    /// Installs it as a user does.
    pub(crate) fn install(self, cluster: &Cluster) -> Result<()> {
        let path = |name: &str| source(name).display().to_string();
        match self {
            Proxy::Svc => cluster.ask(&["apply", "-k", &path("manifests/svc")]).map(drop),
            Proxy::Kube => cluster.ask(&["apply", "-k", &path("manifests/kube-proxy")]).map(drop),
            Proxy::None => Ok(()),
        }
    }

    pub(crate) fn wait(self, cluster: &Cluster) -> Result<()> {
        match self.daemon_set() {
            Some(name) => rollout(cluster, &format!("daemonset/{name}")),
            None => Ok(()),
        }
    }
}

/// Waits until what was asked of an object of kube-system is there.
pub(crate) fn rollout(cluster: &Cluster, object: &str) -> Result<()> {
    cluster.ask(&["-n", "kube-system", "rollout", "status", object, "--timeout=300s"]).map(drop)
}
