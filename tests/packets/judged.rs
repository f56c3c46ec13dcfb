//! What is no Service's is judged once.
use rstest::rstest;
use svc_dataplane::packet::{Packet, TCP, UDP};
use svc_dataplane::tables::Kind::NodePort;
use svc_dataplane::tables::Tables;
use svc_tests::kernel;

use crate::stage::{Family, V4, V6, service};

#[rstest]
fn xdp_tells_tc_of_what_is_no_services_and_of_nothing_else(
    #[values(TCP, UDP)] protocol: u8,
    #[values(V4, V6)] family: Family,
) {
    let (service, request) = service(NodePort, family, protocol, &[(family.remote(), false)], family.client());
    kernel::with(&Tables::with(&[service]), |node| {
        let stranger = Packet { dport: 22, ..request.clone() };
        let told = node.tells_tc(&stranger.frame());
        assert_eq!(told.len(), 8);
        assert_ne!(
            told,
            node.tells_tc(&Packet { sport: stranger.sport ^ 1, ..stranger.clone() }.frame()),
            "one flow's"
        );
        assert!(node.tells_tc(&request.frame()).is_empty());
        let fragment = Packet { piece: Some(0..8), ..stranger };
        assert!(node.tells_tc(&fragment.frame()).is_empty(), "tc has to see it");
    });
}
