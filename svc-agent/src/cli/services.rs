//! `svc-agent services`: every address that a Service answers under.
use serde::Serialize;
use svc_common::map::{
    FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND, FRONTEND_NODE_PORT, FRONTEND_SOURCE_RANGES,
    Frontend, FrontendKey, cluster_set, local_set,
};

use super::namespaces::Namespaces;
use super::print::{self, Inspect, Row};
use crate::dataplane::State;
use crate::dataplane::dump::{key_text, kind, source_ranges};
use crate::inspect::Pins;
use crate::plan::PortName;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    namespaces: Namespaces,

    #[command(flatten)]
    inspect: Inspect,
}

/// One frontend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    pub namespace: String,
    pub name: String,
    /// None where the Service's only port has no name.
    pub port_name: Option<String>,
    pub port: u16,
    pub family: String,
    pub kind: &'static str,
    pub address: String,
    pub backends: usize,
    /// Those that clients under a Local policy get; none without such a policy.
    pub local_backends: Option<usize>,
    pub affinity_seconds: u32,
    /// The sources that are served; empty where all are.
    pub source_ranges: Vec<String>,
}

impl Row for ServiceRow {
    const HEADER: &'static [&'static str] = &["NAMESPACE", "NAME", "PORT", "FAMILY", "KIND", "ADDRESS", "BACKENDS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.namespace.clone(),
            self.name.clone(),
            self.port_name.clone().unwrap_or_else(|| self.port.to_string()),
            self.family.clone(),
            self.kind.to_owned(),
            self.address.clone(),
            match self.local_backends {
                Some(local) => format!("{} ({local} local)", self.backends),
                None => self.backends.to_string(),
            },
        ]
    }
}

/// # Errors
/// Where the pins cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let state = Pins::open(&args.inspect.bpffs)?.state()?;
    let mut rows = rows(&state);
    rows.retain(|row| args.namespaces.has(&row.namespace));
    print::rows(args.inspect.output, &rows)
}

/// By Service, port and family, then by kind and address.
pub fn rows(state: &State) -> Vec<ServiceRow> {
    let mut found: Vec<(PortName, u16, FrontendKey, Frontend)> = state
        .frontends
        .iter()
        .filter_map(|(key, frontend)| {
            let name = state.services.get(&frontend.service)?.unpack();
            Some((PortName::from_map(&name)?, name.port, *key, *frontend))
        })
        .collect();
    found.sort_by(|(name, _, key, frontend), (other_name, _, other_key, other)| {
        let of_frontend = |frontend: &Frontend| frontend.flags & FRONTEND_KIND;
        name.cmp(other_name)
            .then(of_frontend(frontend).cmp(&of_frontend(other)))
            .then_with(|| key_text(key).cmp(&key_text(other_key)))
    });
    found.into_iter().map(|(name, port, key, frontend)| row(state, &name, port, &key, &frontend)).collect()
}

fn row(state: &State, name: &PortName, port: u16, key: &FrontendKey, frontend: &Frontend) -> ServiceRow {
    let count = |set: u32| state.backend_set(set).len();
    let has_local = frontend.flags & (FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL) != 0;
    let address = if frontend.flags & FRONTEND_KIND == FRONTEND_NODE_PORT {
        format!("*:{}/{}", u16::from_be(key.port), name.protocol)
    } else {
        key_text(key)
    };
    ServiceRow {
        namespace: name.service.namespace.to_string(),
        name: name.service.name.to_string(),
        port_name: Some(name.port.to_string()).filter(|port| !port.is_empty()),
        port,
        family: name.family.to_string(),
        kind: kind(frontend.flags),
        address,
        backends: count(cluster_set(frontend.service)),
        local_backends: has_local.then(|| count(local_set(frontend.service))),
        affinity_seconds: frontend.affinity_seconds,
        source_ranges: if frontend.flags & FRONTEND_SOURCE_RANGES == 0 {
            vec![]
        } else {
            source_ranges(state, frontend.service)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::example::state;

    #[test]
    fn every_frontend_is_a_line() {
        insta::assert_snapshot!(print::table(&rows(&state())), @"
        NAMESPACE   NAME   PORT   FAMILY   KIND        ADDRESS                BACKENDS
        default     web    http   IPv4     ClusterIP   10.96.0.10:80/TCP      2
        default     web    http   IPv4     NodePort    *:30080/TCP            2 (1 local)
        default     web    http   IPv6     ClusterIP   [fd00:96::10]:80/TCP   0
        default     web    http   IPv6     NodePort    *:30080/TCP            0 (0 local)
        ");
    }

    #[test]
    fn fields_have_the_api_s_spelling() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&rows(&state())[1]).unwrap(), @r#"
        {
          "namespace": "default",
          "name": "web",
          "portName": "http",
          "port": 80,
          "family": "IPv4",
          "kind": "NodePort",
          "address": "*:30080/TCP",
          "backends": 2,
          "localBackends": 1,
          "affinitySeconds": 0,
          "sourceRanges": []
        }
        "#);
    }

    #[test]
    fn yaml_says_the_same() {
        insta::assert_snapshot!(serde_saphyr::to_string(&&rows(&state())[..1]).unwrap(), @"
        - namespace: default
          name: web
          portName: http
          port: 80
          family: IPv4
          kind: ClusterIP
          address: 10.96.0.10:80/TCP
          backends: 2
          localBackends: null
          affinitySeconds: 0
          sourceRanges: []
        ");
    }
}
