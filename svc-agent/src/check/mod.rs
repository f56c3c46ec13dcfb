//! Whether this machine is fit for the agent, and what to do where it is not. It is looked at, and nothing is changed.
pub mod iptables;
pub mod kernel;
pub mod kube_proxy;
pub mod network;
pub mod nftables;
pub mod places;

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    Ok,
    /// The agent starts, but not all is as it should be.
    Warning,
    /// The agent does not start, or traffic is lost.
    Failed,
}

impl Grade {
    pub const fn label(self) -> &'static str {
        match self {
            Grade::Ok => "ok",
            Grade::Warning => "warning",
            Grade::Failed => "failed",
        }
    }
}

/// What one check has found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    pub result: Grade,
    /// Stable name; docs/operations.md lists them.
    pub check: &'static str,
    pub found: String,
    /// None where nothing is to be done.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Finding { result: Grade::Ok, check, found: found.into(), remedy: None }
    }

    pub fn warning(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { result: Grade::Warning, check, found: found.into(), remedy: Some(remedy.into()) }
    }

    pub fn failed(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { result: Grade::Failed, check, found: found.into(), remedy: Some(remedy.into()) }
    }
}
