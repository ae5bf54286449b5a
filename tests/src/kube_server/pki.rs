//! Keys and certificates of a control plane and of those who talk to it.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use crate::error::{Context as _, Result};

/// Signs certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key, as PKCS 8.
    pub key: String,
}

impl Authority {
    /// A new one. Its name does not make it the same as another of that name.
    pub fn new(name: &str) -> Result<Self> {
        let key = key()?;
        let mut params = named(name, None, &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = made(params.self_signed(&key), name)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A server's certificate for these addresses.
    pub fn server(&self, name: &str, addresses: &[String]) -> Result<Identity> {
        self.sign(named(name, None, addresses)?, ExtendedKeyUsagePurpose::ServerAuth, name)
    }

    /// A client's certificate: the API server takes name and group for the user's.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        self.sign(named(user, group, &[])?, ExtendedKeyUsagePurpose::ClientAuth, user)
    }

    fn sign(&self, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose, name: &str) -> Result<Identity> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = key()?;
        let certificate = made(params.signed_by(&key, &self.issuer), name)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

/// A new key.
pub(super) fn key() -> Result<KeyPair> {
    made(KeyPair::generate(), "key")
}

fn named(name: &str, group: Option<&str>, addresses: &[String]) -> Result<CertificateParams> {
    let mut params = made(CertificateParams::new(addresses), name)?;
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    Ok(params)
}

fn made<T>(result: std::result::Result<T, rcgen::Error>, name: &str) -> Result<T> {
    result.map_err(std::io::Error::other).context(|| format!("make the certificate of {name}"))
}
