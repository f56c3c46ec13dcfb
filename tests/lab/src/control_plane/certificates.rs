//! An authority of the lab's own, and what it signs.
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};

pub(super) const ADMIN: &str = "admin";
pub(super) const AGENT: &str = "agent";

/// Signs for one cluster. Everything is written into one directory.
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Writes its own certificate, and the key that service accounts' tokens are signed with.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut authority = named("svc-lab", None);
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        fs::write(directory.join("ca.crt"), authority.self_signed(&key)?.pem())?;

        let service_accounts = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        fs::write(directory.join("service-accounts.key"), service_accounts.serialize_pem())?;
        fs::write(directory.join("service-accounts.pub"), service_accounts.public_key_pem())?;
        Ok(Authority { directory: directory.to_owned(), issuer: Issuer::new(authority, key) })
    }

    /// The API server's, `server`: good for these addresses, and for those that every cluster's has.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn server(&self, addresses: &[Ipv4Addr]) -> Result<()> {
        let mut server = named("kube-apiserver", None);
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for address in addresses.iter().copied().chain([Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 96, 0, 1)]) {
            server.subject_alt_names.push(SanType::IpAddress(address.into()));
        }
        for name in ["kubernetes", "kubernetes.default", "kubernetes.default.svc"] {
            server.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        self.sign("server", &server)
    }

    /// A user's, of a group that RBAC may bind roles to.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn client(&self, file: &str, user: &str, group: Option<&str>) -> Result<()> {
        let mut client = named(user, group);
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(file, &client)
    }

    fn sign(&self, name: &str, parameters: &CertificateParams) -> Result<()> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        fs::write(self.directory.join(format!("{name}.crt")), certificate.pem())?;
        fs::write(self.directory.join(format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }
}

/// Certificates and keys of the API server, of its clients and of service accounts.
pub(super) fn write(directory: &Path, addresses: &[Ipv4Addr]) -> Result<()> {
    let authority = Authority::new(directory)?;
    authority.server(addresses)?;
    // The groups and users that RBAC binds roles to at the first start.
    authority.client(ADMIN, "admin", Some("system:masters"))?;
    authority.client(AGENT, "system:kube-proxy", None)
}

fn named(name: &str, organisation: Option<&str>) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, name);
    if let Some(organisation) = organisation {
        parameters.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    parameters
}
