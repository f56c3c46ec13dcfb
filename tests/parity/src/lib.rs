//! svc beside the real kube-proxy: the same objects, the same nodes, the same probes, and the rows in which the verdicts
//! differ. kube-proxy's verdicts are recorded in `verdicts/`, so that svc can be compared with them where there is no
//! kube-proxy.
pub mod catalogue;
pub mod differences;
pub mod objects;
pub mod probe;
pub mod proxy;
pub mod recorded;
pub mod report;
pub mod run;
pub mod verdict;
