//! An authority of the lab's own, and what it signs.
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};

pub(super) const ADMIN: &str = "admin";
pub(super) const AGENT: &str = "agent";

/// Certificates and keys of the API server, of its clients and of service accounts.
pub(super) fn write(directory: &Path, addresses: &[Ipv4Addr]) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut authority = named("svc-lab", None);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    fs::write(directory.join("ca.crt"), authority.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(authority, key);

    let mut server = named("kube-apiserver", None);
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for address in addresses.iter().copied().chain([Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 96, 0, 1)]) {
        server.subject_alt_names.push(SanType::IpAddress(address.into()));
    }
    server.subject_alt_names.push(SanType::DnsName("kubernetes.default.svc".try_into()?));
    sign(directory, "server", &server, &issuer)?;

    // The groups and users that RBAC binds roles to at the first start.
    for (file, user, group) in [(ADMIN, "admin", Some("system:masters")), (AGENT, "system:kube-proxy", None)] {
        let mut client = named(user, group);
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        sign(directory, file, &client, &issuer)?;
    }

    let service_accounts = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    fs::write(directory.join("service-accounts.key"), service_accounts.serialize_pem())?;
    fs::write(directory.join("service-accounts.pub"), service_accounts.public_key_pem())?;
    Ok(())
}

fn named(name: &str, organisation: Option<&str>) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, name);
    if let Some(organisation) = organisation {
        parameters.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    parameters
}

fn sign(directory: &Path, name: &str, parameters: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<()> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    fs::write(directory.join(format!("{name}.crt")), parameters.signed_by(&key, issuer)?.pem())?;
    fs::write(directory.join(format!("{name}.key")), key.serialize_pem())?;
    Ok(())
}
