//! `/healthz` and `/livez`, as kube-proxy answers them, but not before every Service is in the kernel.
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use k8s_openapi::jiff::Timestamp;

use crate::serve::Answer;
use crate::status::Status;

/// The kernel may refuse changes for this long before that is ill health (kube-proxy's healthTimeout, two sync periods).
const PATIENCE: Duration = Duration::from_secs(60);

/// `/livez` is about the agent, `/healthz` also about whether load balancers may use the node (KEP-3836).
pub fn answer(path: &str, status: &Status, now: SystemTime) -> Option<Answer> {
    let for_balancers = match path {
        "/healthz" => true,
        "/livez" => false,
        _ => return None,
    };
    let progress = status.progress();
    let late = progress.failing_since.is_some_and(|since| now.duration_since(since).unwrap_or_default() >= PATIENCE);
    let eligible = status.node_eligible();
    let healthy = progress.last.is_some() && !late && (eligible || !for_balancers);
    let updated = match progress.last {
        // The time of the look, not of the last change: balancers take an old one for a hung proxy.
        Some(_) if healthy => timestamp(now),
        Some((time, _)) => timestamp(time),
        None => "0001-01-01T00:00:00Z".to_owned(),
    };
    let now = timestamp(now);
    let body = if for_balancers {
        format!(r#"{{"lastUpdated": "{updated}","currentTime": "{now}", "nodeEligible": {eligible}}}"#)
    } else {
        format!(r#"{{"lastUpdated": "{updated}","currentTime": "{now}"}}"#)
    };
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Some(Answer { status, content_type: "application/json", body })
}

fn timestamp(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Sync;

    const SYNC: Sync = Sync { took: Duration::from_millis(1), operations: 1, services: 1, frontends: 1, backends: 1 };

    fn codes(status: &Status, now: SystemTime) -> [u16; 2] {
        ["/healthz", "/livez"].map(|path| answer(path, status, now).unwrap().status.as_u16())
    }

    #[test]
    fn nothing_is_healthy_before_the_first_sync_is_in_the_kernel() {
        let status = Status::default();
        assert_eq!(codes(&status, SystemTime::now()), [503, 503]);
        status.synced(SYNC);
        assert_eq!(codes(&status, SystemTime::now()), [200, 200]);
    }

    #[test]
    fn a_node_about_to_be_deleted_is_alive_but_not_for_load_balancers() {
        let status = Status::default();
        status.synced(SYNC);
        status.set_node_eligible(false);
        assert_eq!(codes(&status, SystemTime::now()), [503, 200]);
    }

    #[test]
    fn a_kernel_that_refuses_changes_for_long_is_ill_health_until_it_takes_one() {
        let status = Status::default();
        status.synced(SYNC);
        status.sync_failed();
        let now = SystemTime::now();
        assert_eq!(codes(&status, now + PATIENCE / 2), [200, 200]);
        assert_eq!(codes(&status, now + PATIENCE * 2), [503, 503]);
        status.synced(SYNC);
        assert_eq!(codes(&status, now + PATIENCE * 2), [200, 200]);
    }

    #[test]
    fn the_body_has_kube_proxys_fields() {
        let status = Status::default();
        let time = SystemTime::UNIX_EPOCH;
        let body = |path| answer(path, &status, time).unwrap().body;
        let common = r#""lastUpdated": "0001-01-01T00:00:00Z","currentTime": "1970-01-01T00:00:00Z""#;
        assert_eq!(body("/healthz"), format!(r#"{{{common}, "nodeEligible": true}}"#));
        assert_eq!(body("/livez"), format!("{{{common}}}"));
        assert_eq!(answer("/", &status, time), None);
    }
}
