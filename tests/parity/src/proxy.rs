//! Who serves the Services on the lab's nodes.
use anyhow::Result;
use svc_lab::agent::Agent;
use svc_lab::kube_proxy::{KubeProxy, Mode};
use svc_lab::source::Source;
use svc_lab::topology::{Lab, NODES};

use crate::catalogue::Setting;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proxy {
    Svc,
    KubeProxy(Mode),
}

impl Proxy {
    pub fn name(self) -> String {
        match self {
            Proxy::Svc => "svc".to_owned(),
            Proxy::KubeProxy(mode) => format!("kube-proxy ({})", mode.name()),
        }
    }
}

/// One on each node, until dropped.
pub enum Proxies {
    Svc(Vec<Agent>),
    KubeProxy(Vec<KubeProxy>),
}

impl Proxies {
    /// Starts them, and waits until each says that the kernel knows everything.
    pub fn start(proxy: Proxy, lab: &Lab, source: &Source, setting: Setting) -> Result<Self> {
        let addresses = setting.node_port_addresses();
        match proxy {
            Proxy::Svc => {
                let list = addresses.join(",");
                let arguments: &[&str] = if list.is_empty() { &[] } else { &["--nodeport-addresses", &list] };
                let agents = NODES.iter().map(|node| Agent::start(lab, node, source, arguments));
                Ok(Proxies::Svc(agents.collect::<Result<_>>()?))
            }
            Proxy::KubeProxy(mode) => {
                let control_plane = source.api_server()?;
                let all = NODES.iter().map(|node| KubeProxy::start(lab, node, control_plane, mode, addresses));
                Ok(Proxies::KubeProxy(all.collect::<Result<_>>()?))
            }
        }
    }

    pub fn log_tails(&self) -> String {
        match self {
            Proxies::Svc(agents) => agents.iter().map(Agent::log_tail).collect(),
            Proxies::KubeProxy(proxies) => proxies.iter().map(KubeProxy::log_tail).collect(),
        }
    }
}
