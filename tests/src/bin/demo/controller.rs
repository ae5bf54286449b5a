//! The objects: Services as a user wrote them, and the EndpointSlices that a cluster's controller makes of them.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::manifests::{Endpoint, EndpointSlice};
use proxy_tests::{Family, Manifests, Pod};
use serde_json::Value;

/// A file with one Service.
#[derive(Clone, Debug)]
pub(crate) struct Example {
    file: String,
    text: String,
    object: Value,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) number: u16,
    pub(crate) target: u16,
}

/// Reads every YAML file of a folder.
pub(crate) fn read(folder: &Path) -> Result<Vec<Example>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "yaml"));
    paths.sort();
    ensure!(!paths.is_empty(), "{} has no YAML files", folder.display());
    paths.iter().map(|path| Example::read(path).with_context(|| path.display().to_string())).collect()
}

impl Example {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let object: Value = serde_saphyr::from_str(&text)?;
        if object["kind"] != "Service" {
            bail!("is a {}, not a Service", object["kind"]);
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { file, text, object })
    }

    /// Name of the file.
    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    /// Name of the Service.
    pub(crate) fn name(&self) -> &str {
        self.object["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Its address of a family.
    pub(crate) fn address(&self, family: Family) -> Result<IpAddr> {
        let all = self.addresses()?;
        all.into_iter().find(|&ip| Family::of(ip) == family).with_context(|| format!("{} has no {family}", self.name()))
    }

    fn addresses(&self) -> Result<Vec<IpAddr>> {
        let texts = self.object["spec"]["clusterIPs"].as_array().context("no clusterIPs")?;
        texts.iter().map(|ip| Ok(ip.as_str().unwrap_or_default().parse()?)).collect()
    }

    /// Its ports.
    pub(crate) fn ports(&self) -> Result<Vec<Port>> {
        let ports = self.object["spec"]["ports"].as_array().context("no ports")?;
        let port = |value: &Value| {
            let number = |field: &str| {
                let number = value[field].as_u64().and_then(|number| u16::try_from(number).ok());
                number.with_context(|| format!("{field} is no port number"))
            };
            let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
            Ok(Port {
                name: text("name"),
                protocol: text("protocol"),
                number: number("port")?,
                target: number("targetPort")?,
            })
        };
        ports.iter().map(port).collect()
    }

    /// Address and port at which a port is reached.
    pub(crate) fn at(&self, family: Family, port: &str) -> Result<SocketAddr> {
        let ports = self.ports()?;
        let port =
            ports.iter().find(|p| p.name == port).with_context(|| format!("{} has no port {port}", self.name()))?;
        Ok(SocketAddr::new(self.address(family)?, port.number))
    }

    /// Applies it as it is in its file.
    pub(crate) fn apply(&self, folder: &Manifests) -> Result<()> {
        Ok(folder.write_text(&self.file, &self.text)?)
    }

    /// Changes a port's number, as `kubectl edit` would.
    pub(crate) fn edit_port(&mut self, name: &str, number: u16) -> Result<()> {
        let ports = self.object["spec"]["ports"].as_array_mut().context("no ports")?;
        let port = ports.iter_mut().find(|port| port["name"] == name).with_context(|| format!("no port {name}"))?;
        port["port"] = number.into();
        self.text = proxy_tests::manifests::yaml(&self.object);
        Ok(())
    }

    /// The pods that its selector names. A pod's label `app` is its name without the number, as its Deployment has it.
    pub(crate) fn selected(&self, pods: &[Pod]) -> Vec<Pod> {
        let app = self.object["spec"]["selector"]["app"].as_str().unwrap_or_default();
        let labelled = |pod: &&Pod| pod.name().rsplit_once('-').is_some_and(|(name, _)| name == app);
        pods.iter().filter(labelled).cloned().collect()
    }

    /// Its EndpointSlices with these pods: one for each family.
    pub(crate) fn slices(&self, pods: &[Pod]) -> Result<Vec<EndpointSlice>> {
        let ports: Vec<_> = self.ports()?.into_iter().map(|port| (port.name, port.protocol, port.target)).collect();
        let namespace = self.object["metadata"]["namespace"].as_str().unwrap_or("default");
        let slice = |ip: IpAddr| {
            let family = Family::of(ip);
            EndpointSlice {
                namespace: namespace.to_owned(),
                name: format!("{}-{}", self.name(), family.to_string().to_lowercase()),
                service: self.name().to_owned(),
                family,
                ports: ports.clone(),
                endpoints: pods.iter().map(|pod| Endpoint::of(pod, family)).collect(),
            }
        };
        Ok(self.addresses()?.into_iter().map(slice).collect())
    }

    /// Writes its EndpointSlices.
    pub(crate) fn apply_slices(&self, folder: &Manifests, pods: &[Pod]) -> Result<()> {
        self.slices(pods)?.iter().try_for_each(|slice| Ok(folder.write(slice)?))
    }
}
