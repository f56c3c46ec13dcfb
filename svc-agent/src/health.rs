//! `/healthz` and `/livez`, as kube-proxy answers them, but not before every Service is in the kernel.
use std::collections::BTreeMap;
use std::time::SystemTime;

use hyper::StatusCode;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::serve::Answer;
use crate::status::Status;

/// `/livez` is about the agent, `/healthz` also about whether load balancers may use the node (KEP-3836).
pub fn answer(path: &str, status: &Status, now: SystemTime) -> Option<Answer> {
    let for_balancers = match path {
        "/healthz" => true,
        "/livez" => false,
        _ => return None,
    };
    let progress = status.progress();
    let eligible = status.node_eligible();
    let up_to_date = proxy_is_healthy(status, now);
    let healthy = up_to_date && (eligible || !for_balancers);
    let updated = match progress.last {
        // The time of the look, not of the last change: balancers take an old one for a hung proxy.
        Some(_) if healthy => timestamp(now),
        Some((time, _)) => timestamp(time),
        None => "0001-01-01T00:00:00Z".to_owned(),
    };
    let family = |time: SystemTime| Family { last_updated: timestamp(time), healthy: up_to_date };
    let body = Body {
        last_updated: updated,
        current_time: timestamp(now),
        node_eligible: for_balancers.then_some(eligible),
        healthy: up_to_date,
        // One write serves both families.
        status: progress.last.map(|(time, _)| ["IPv4", "IPv6"].map(|name| (name, family(time))).into()),
    };
    let body = serde_json::to_string(&body).unwrap_or_default();
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    status.asked(!for_balancers, code.as_u16());
    Some(Answer { status: code, content_type: "application/json", body })
}

/// The kernel has every Service, and has not refused changes for long.
pub fn proxy_is_healthy(status: &Status, now: SystemTime) -> bool {
    let progress = status.progress();
    let late = progress
        .failing_since
        .is_some_and(|since| now.duration_since(since).unwrap_or_default() >= status.health_timeout());
    progress.last.is_some() && !late
}

/// Kube-proxy's fields, as of 1.36.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<BTreeMap<&'static str, Family>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Family {
    last_updated: String,
    healthy: bool,
}

fn timestamp(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::status::Sync;

    fn codes(status: &Status, now: SystemTime) -> [u16; 2] {
        ["/healthz", "/livez"].map(|path| answer(path, status, now).unwrap().status.as_u16())
    }

    #[test]
    fn nothing_is_healthy_before_the_first_sync_is_in_the_kernel() {
        let status = Status::default();
        assert_eq!(codes(&status, SystemTime::now()), [503, 503]);
        status.synced(Sync::default());
        assert_eq!(codes(&status, SystemTime::now()), [200, 200]);
    }

    #[test]
    fn a_node_about_to_be_deleted_is_alive_but_not_for_load_balancers() {
        let status = Status::default();
        status.synced(Sync::default());
        status.set_node_eligible(false);
        assert_eq!(codes(&status, SystemTime::now()), [503, 200]);
    }

    #[test]
    fn a_kernel_that_refuses_changes_for_two_sync_periods_is_ill_health_until_it_takes_one() {
        const PERIOD: Duration = Duration::from_secs(10);
        let status = Status::new(PERIOD);
        status.synced(Sync::default());
        status.sync_failed();
        let now = SystemTime::now();
        assert_eq!(codes(&status, now + PERIOD), [200, 200]);
        assert_eq!(codes(&status, now + PERIOD * 3), [503, 503]);
        status.synced(Sync::default());
        assert_eq!(codes(&status, now + PERIOD * 3), [200, 200]);
    }

    #[test]
    fn the_body_has_kube_proxys_fields() {
        let status = Status::default();
        let time = SystemTime::UNIX_EPOCH;
        let body = |path| answer(path, &status, time).unwrap().body;
        let common = r#""lastUpdated":"0001-01-01T00:00:00Z","currentTime":"1970-01-01T00:00:00Z""#;
        assert_eq!(body("/healthz"), format!(r#"{{{common},"nodeEligible":true,"healthy":false}}"#));
        assert_eq!(body("/livez"), format!(r#"{{{common},"healthy":false}}"#));
        status.synced(Sync::default());
        status.set_node_eligible(false);
        let fields: serde_json::Value = serde_json::from_str(&body("/healthz")).unwrap();
        assert_eq!((&fields["nodeEligible"], &fields["healthy"]), (&false.into(), &true.into()));
        for family in ["IPv4", "IPv6"] {
            let of_family = &fields["status"][family];
            assert_eq!((&of_family["lastUpdated"], &of_family["healthy"]), (&fields["lastUpdated"], &true.into()));
        }
        assert_eq!(answer("/", &status, time), None);
    }
}
