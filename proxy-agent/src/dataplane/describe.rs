//! The map `layout`: what the other maps look like, field by field, and the settings of the programs.
//!
//! Whoever finds these pins can read them, even an agent of a version that has other layouts: see [`super::upgrade`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::MapType;
use proxy_abi::policy::{
    Bits, BitsKey, BlockEntry, CellEntry, CellWord, HitsEntry, PodDigest, PodHits, PortPage, SetEntry, SlotWord,
    map as policy_map,
};
use proxy_abi::{
    AffinityEntry, AffinityKey, BackendEntry, CgroupPodEntry, CounterEntry, DeviceEntry, Field, Fields, FlowEntry,
    FlowKey, FragmentEntry, FragmentKey, FrontendEntry, FrontendKey, IpBytes, LayoutRow, LocalPodEntry, PrefixKey,
    ServiceEntry, SocketEntry, SocketKey, map,
};

use super::Error;
use super::map::{Layout, Map, size_u32};
use super::sysbpf;

/// A leaf of a key or value: its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Bytes before it.
    pub offset: usize,
    /// Bytes of it.
    pub size: usize,
}

/// Where each field of a key or value lies, by its name with dots.
pub type Shape = BTreeMap<String, Place>;

/// A key and a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Shape,
    /// The value.
    pub value: Shape,
}

/// What a directory of pins says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Entries by map.
    pub maps: BTreeMap<String, Entry>,
    /// Settings of the programs by name.
    pub settings: BTreeMap<String, u32>,
}

/// Setting: established flows through Services that one pod may have begun; 0 = any number.
pub const POD_QUOTA: &str = "pod_quota";
/// Setting: a pod reaches its own node whatever its policies say; 0 or 1.
pub const NODE_OPEN: &str = "node_open";
/// Setting: sockets of pods are translated, too; 0 or 1.
pub const SOCKET_LB: &str = "socket_lb";
/// Settings: seconds that a flow which is not TCP may be idle for, without an answer and with answers.
pub const UDP_IDLE: [&str; 2] = ["udp_unreplied", "udp_assured"];

const LAYOUT: Layout =
    Layout { name: map::LAYOUT, kind: MapType::Array, key: size_u32::<u32>(), value: size_u32::<LayoutRow>() };
const UNUSED: LayoutRow = LayoutRow { map: [0; 16], name: [0; 36], part: LayoutRow::UNUSED, offset: 0, size: 0 };

fn shape<T: Fields>() -> Shape {
    let mut shape = Shape::new();
    match T::FIELDS {
        // A number or an address has no name: one place.
        [] => {
            shape.insert(String::new(), Place { offset: 0, size: size_of::<T>() });
        }
        fields => leaves(fields, "", 0, &mut shape),
    }
    shape
}

fn leaves(fields: &[Field], above: &str, begin: usize, shape: &mut Shape) {
    for field in fields {
        let name = format!("{above}{}", field.name);
        match field.inside {
            [] => {
                shape.insert(name, Place { offset: begin + field.offset, size: field.size });
            }
            inside => leaves(inside, &format!("{name}."), begin + field.offset, shape),
        }
    }
}

fn entry<K: Fields, V: Fields>(name: &str) -> (String, Entry) {
    (name.to_owned(), Entry { key: shape::<K>(), value: shape::<V>() })
}

impl Description {
    /// Of this version.
    pub fn own(settings: &[(&str, u32)]) -> Self {
        Self {
            maps: BTreeMap::from([
                entry::<u32, ServiceEntry>(map::SERVICE),
                entry::<u32, BackendEntry>(map::BACKEND),
                entry::<u32, u32>(map::BACKEND_SLOT),
                entry::<FrontendKey, FrontendEntry>(map::FRONTEND),
                entry::<u32, DeviceEntry>(map::DEVICE),
                entry::<IpBytes, LocalPodEntry>(map::LOCAL_POD),
                entry::<FlowKey, FlowEntry>(map::FLOW_LIVE),
                entry::<FlowKey, FlowEntry>(map::FLOW_BRIEF),
                entry::<FragmentKey, FragmentEntry>(map::FRAGMENT),
                entry::<SocketKey, SocketEntry>(map::SOCKET),
                entry::<u32, CounterEntry>(map::COUNTER),
                entry::<PrefixKey, u32>(map::PREFIX),
                entry::<AffinityKey, AffinityEntry>(map::AFFINITY),
                entry::<u32, u64>(map::POD_FLOWS),
                entry::<u64, CgroupPodEntry>(map::CGROUP_POD),
                entry::<SocketKey, SocketEntry>(map::POD_SOCKET),
                entry::<u32, u32>(policy_map::EPOCH),
                entry::<u32, SlotWord>(policy_map::SLOT),
                entry::<u32, PodDigest>(policy_map::POD),
                entry::<u32, BlockEntry>(policy_map::BLOCK),
                entry::<u32, SetEntry>(policy_map::SET),
                entry::<IpBytes, CellWord>(policy_map::IP),
                entry::<PrefixKey, CellWord>(policy_map::PREFIX),
                entry::<u32, PortPage>(policy_map::PAGE),
                entry::<u32, CellEntry>(policy_map::CELL),
                entry::<BitsKey, Bits>(policy_map::BITS),
                entry::<u32, HitsEntry>(policy_map::HITS),
                entry::<u32, PodHits>(policy_map::POD_HITS),
            ]),
            settings: settings.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        }
    }

    /// As pinned in a directory; `None` when nothing is said there.
    ///
    /// # Errors
    /// When it cannot be read, or is not what its name says.
    pub fn read(directory: &Path) -> Result<Option<Self>, Error> {
        if !directory.join(map::LAYOUT).exists() {
            return Ok(None);
        }
        let rows = Map::<u32, LayoutRow>::open(directory, LAYOUT)?.read()?;
        Ok(Some(Self::from_rows(rows.iter().map(|(_, row)| row))))
    }

    /// Pins it in a directory, in place of what is said there.
    ///
    /// # Errors
    /// When the map cannot be made, pinned or written.
    pub fn write(&self, directory: &Path) -> Result<(), Error> {
        let path = directory.join(map::LAYOUT);
        if !path.exists() {
            let pin = |source| Error::pin(&path, source);
            let fd = sysbpf::map_create_array(map::LAYOUT, LAYOUT.value, LayoutRow::ROOM).map_err(pin)?;
            sysbpf::obj_pin(fd.as_fd(), &path).map_err(pin)?;
        }
        let pinned = Map::<u32, LayoutRow>::open(directory, LAYOUT)?;
        let rows = self.rows().ok_or_else(|| {
            let source = io::Error::other("a name or their number is too large for a row");
            Error::Pin { path: path.clone(), source }
        })?;
        for (index, row) in (0..LayoutRow::ROOM).zip(rows.iter().chain(std::iter::repeat(&UNUSED))) {
            pinned.set(&index, row)?;
        }
        Ok(())
    }

    fn rows(&self) -> Option<Vec<LayoutRow>> {
        let number = |size: usize| u32::try_from(size).ok();
        let mut rows = Vec::new();
        for (map, entry) in &self.maps {
            for (part, shape) in [(LayoutRow::KEY, &entry.key), (LayoutRow::VALUE, &entry.value)] {
                for (name, place) in shape {
                    let (offset, size) = (number(place.offset)?, number(place.size)?);
                    rows.push(LayoutRow { map: padded(map)?, name: padded(name)?, part, offset, size });
                }
            }
        }
        for (name, value) in &self.settings {
            rows.push(LayoutRow { name: padded(name)?, part: LayoutRow::SETTING, offset: *value, ..UNUSED });
        }
        (rows.len() <= LayoutRow::ROOM as usize).then_some(rows)
    }

    fn from_rows<'a>(rows: impl Iterator<Item = &'a LayoutRow>) -> Self {
        let mut found = Self::default();
        for row in rows {
            let (map, name) = (text(&row.map), text(&row.name));
            let place = Place { offset: row.offset as usize, size: row.size as usize };
            match row.part {
                LayoutRow::KEY => found.maps.entry(map).or_default().key.insert(name, place),
                LayoutRow::VALUE => found.maps.entry(map).or_default().value.insert(name, place),
                LayoutRow::SETTING => {
                    found.settings.insert(name, row.offset);
                    None
                }
                _ => None,
            };
        }
        found
    }
}

fn padded<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(bytes)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::pins::LAYOUTS;
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let own = Description::own(&[(POD_QUOTA, 65_536)]);
        let rows = own.rows().expect("they fit");
        assert_eq!(Description::from_rows(rows.iter().chain([&UNUSED])), own);
    }

    #[test]
    fn every_byte_of_every_map_is_described() {
        let own = Description::own(&[]);
        assert_eq!(own.maps.len(), LAYOUTS.len());
        for layout in LAYOUTS {
            let entry = &own.maps[layout.name];
            for (shape, size) in [(&entry.key, layout.key), (&entry.value, layout.value)] {
                let mut places: Vec<_> = shape.values().copied().collect();
                places.sort();
                let end = places.iter().fold(0, |at, place| {
                    assert_eq!(place.offset, at, "{}: {shape:?}", layout.name);
                    at + place.size
                });
                assert_eq!(end, size as usize, "{}", layout.name);
            }
        }
    }

    #[test]
    fn fields_of_fields_have_names_with_dots() {
        let flow = &Description::own(&[]).maps[map::FLOW_LIVE];
        assert_eq!(flow.value["translated.dst"], Place { offset: 52, size: 16 });
        assert_eq!(flow.key["low_port"], Place { offset: 32, size: 2 });
    }
}
