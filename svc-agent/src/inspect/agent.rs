//! What the running agent says of itself, by its own HTTP endpoints on this host.
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde::Serialize;

/// For an endpoint of this very host.
const TIMEOUT: Duration = Duration::from_secs(1);
/// More than any of its pages has.
const LONGEST: u64 = 4 << 20;

/// None of a field: the agent did not say.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// It answers.
    pub running: bool,
    /// HTTP status of /healthz.
    pub healthz: Option<u16>,
    /// Seconds since 1970 when the kernel last was up to date.
    pub last_sync: Option<f64>,
    /// Whether the source of Services can be reached.
    pub source_connected: Option<bool>,
    /// Whether load balancers may send traffic to this node.
    pub node_eligible: Option<bool>,
    pub sync_errors: Option<u64>,
    /// What somebody else had changed or detached.
    pub repairs: Option<u64>,
}

/// Asks the agent that serves health and metrics at these addresses.
pub fn ask(healthz: SocketAddr, metrics: SocketAddr) -> Agent {
    let healthz = get(healthz, "/healthz").ok().map(|(status, _)| status);
    let page = get(metrics, "/metrics").ok().filter(|(status, _)| *status == 200).map(|(_, page)| page);
    read(healthz, page.as_deref())
}

fn read(healthz: Option<u16>, page: Option<&str>) -> Agent {
    let sum = |name: &str| {
        let mut samples = page?.lines().filter_map(|line| sample(line, name)).peekable();
        samples.peek().is_some().then(|| samples.sum::<f64>())
    };
    let is_one = |name: &str| sum(name).map(|value| value == 1.0);
    Agent {
        running: healthz.is_some() || page.is_some(),
        healthz,
        last_sync: sum("svc_sync_last_timestamp_seconds"),
        source_connected: is_one("svc_source_connected"),
        node_eligible: is_one("svc_node_eligible"),
        sync_errors: sum("svc_sync_errors_total").map(|value| value as u64),
        repairs: page.map(|_| sum("svc_repairs_total").unwrap_or(0.0) as u64),
    }
}

/// The value of a line of Prometheus' text format, where it is of this metric.
fn sample(line: &str, name: &str) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let value = match rest.strip_prefix('{') {
        Some(labels) => labels.rsplit_once('}')?.1,
        None => rest.strip_prefix(' ')?,
    };
    value.trim().parse().ok()
}

/// The status and the body.
fn get(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&reachable(address), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    status.zip(body).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP"))
}

/// Who listens at all addresses does at the loopback one.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_are_summed_and_others_left_out() {
        let page = "# TYPE svc_repairs_total counter\nsvc_repairs_total{map=\"links\"} 2\nsvc_repairs_total{map=\"a b\"} 3\n\
                    svc_repairs_total_more 9\nsvc_source_connected 0\nsvc_sync_last_timestamp_seconds 12.5\n";
        let agent = read(Some(200), Some(page));
        let expected = Agent {
            running: true,
            healthz: Some(200),
            last_sync: Some(12.5),
            source_connected: Some(false),
            repairs: Some(5),
            ..Agent::default()
        };
        assert_eq!(agent, expected);
    }

    #[test]
    fn nobody_that_answers_is_no_agent_that_runs() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        drop(taken);
        assert_eq!(ask(address, address), Agent::default());
    }
}
