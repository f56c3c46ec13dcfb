//! How long flows live without a packet. The flags are kube-proxy's, where it has one.
use std::time::Duration;

use anyhow::ensure;
use svc_common::flow::Timeouts;

use crate::go_duration;

/// None, or 0: as the configuration file says, or the default.
#[derive(clap::Args, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TimeoutArgs {
    /// How long an established TCP flow lives without a packet [default: 24h].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    pub conntrack_tcp_timeout_established: Option<Duration>,

    /// A TCP flow of which one side has ended [default: 1h].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,

    /// A UDP flow with packets one way only [default: 30s].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    pub conntrack_udp_timeout: Option<Duration>,

    /// A UDP flow with packets both ways [default: 2m].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    pub conntrack_udp_timeout_stream: Option<Duration>,

    /// An established SCTP flow; kube-proxy has no such flag [default: 3m30s].
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse)]
    pub conntrack_sctp_timeout_established: Option<Duration>,
}

impl TimeoutArgs {
    /// What these say, else `file`, else the defaults.
    ///
    /// # Errors
    /// Where one is less than a second or longer than a flow's clock can tell.
    pub fn timeouts(&self, file: &TimeoutArgs) -> anyhow::Result<Timeouts> {
        let seconds = |name: &str, flag: Option<Duration>, file: Option<Duration>, default: u32| {
            let is_set = |time: &Duration| !time.is_zero();
            let Some(time) = flag.filter(is_set).or(file.filter(is_set)) else { return Ok(default) };
            let most = Duration::from_secs(Timeouts::MAX.into());
            ensure!(
                (Duration::from_secs(1)..=most).contains(&time),
                "--conntrack-{name}, or its field of the configuration file, is not between 1s and {}",
                kube::core::Duration::from(most)
            );
            Ok(time.as_secs() as u32)
        };
        let default = Timeouts::DEFAULT;
        Ok(Timeouts {
            tcp_established: seconds(
                "tcp-timeout-established",
                self.conntrack_tcp_timeout_established,
                file.conntrack_tcp_timeout_established,
                default.tcp_established,
            )?,
            tcp_closing: seconds(
                "tcp-timeout-close-wait",
                self.conntrack_tcp_timeout_close_wait,
                file.conntrack_tcp_timeout_close_wait,
                default.tcp_closing,
            )?,
            udp: seconds("udp-timeout", self.conntrack_udp_timeout, file.conntrack_udp_timeout, default.udp)?,
            udp_stream: seconds(
                "udp-timeout-stream",
                self.conntrack_udp_timeout_stream,
                file.conntrack_udp_timeout_stream,
                default.udp_stream,
            )?,
            sctp_established: seconds(
                "sctp-timeout-established",
                self.conntrack_sctp_timeout_established,
                file.conntrack_sctp_timeout_established,
                default.sctp_established,
            )?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn established(seconds: u64) -> TimeoutArgs {
        TimeoutArgs { conntrack_tcp_timeout_established: Some(Duration::from_secs(seconds)), ..TimeoutArgs::default() }
    }

    #[test]
    fn a_flag_comes_before_the_file_and_that_before_the_default() {
        let none = TimeoutArgs::default();
        let of = |flags: TimeoutArgs, file: TimeoutArgs| flags.timeouts(&file).unwrap().tcp_established;
        assert_eq!(of(established(60), established(90)), 60);
        assert_eq!(of(none, established(90)), 90);
        assert_eq!(of(established(0), established(90)), 90, "0 is as good as not given");
        assert_eq!(of(none, none), 86_400);
    }

    #[test]
    fn what_a_flows_clock_cannot_tell_is_refused() {
        for seconds in [u64::from(Timeouts::MAX) + 1, 1 << 40] {
            let error = established(seconds).timeouts(&TimeoutArgs::default()).unwrap_err().to_string();
            assert!(error.contains("tcp-timeout-established") && error.contains("129600s"), "{error}");
        }
        assert!(established(u64::from(Timeouts::MAX)).timeouts(&TimeoutArgs::default()).is_ok());
    }
}
