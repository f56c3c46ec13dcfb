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
