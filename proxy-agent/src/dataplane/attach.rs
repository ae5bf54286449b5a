//! Programs on interfaces and on the root cgroup.
//!
//! | way | kernel | survives the agent by | swapped by |
//! | --- | --- | --- | --- |
//! | tcx | 6.6 | the pin of its link | `BPF_LINK_UPDATE` |
//! | clsact | any | itself: filters belong to the interface | `RTM_NEWTFILTER` with replace, same priority and handle |
//! | cgroup | 5.7 | the pin of its link | `BPF_LINK_UPDATE` |
//!
//! Nothing is detached in order to attach something, unless `--attach` was changed: there is no moment without a
//! program.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use aya::Ebpf;
use aya::programs::tc::{NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TcError, tc};

use proxy_abi::DeviceEntry;

use super::pins::{LinkPin, Pins};
use super::sysbpf::{self, attach_type};
use super::{AttachMode, Error};
use crate::node::netlink::Requests;

/// Programs of a pod interface, with their directions.
pub const POD_PROGRAMS: [(&str, TcAttachType, u32); 2] = [
    ("from_pod", TcAttachType::Ingress, attach_type::TCX_INGRESS),
    ("to_pod", TcAttachType::Egress, attach_type::TCX_EGRESS),
];

/// Programs of an uplink or tunnel, with their directions.
pub const NETDEV_PROGRAMS: [(&str, TcAttachType, u32); 2] = [
    ("from_netdev", TcAttachType::Ingress, attach_type::TCX_INGRESS),
    ("to_netdev", TcAttachType::Egress, attach_type::TCX_EGRESS),
];

/// A pair of programs for one interface.
pub type Programs = [(&'static str, TcAttachType, u32); 2];

/// The programs that an interface gets.
pub const fn programs(entry: &DeviceEntry) -> Option<&'static Programs> {
    if entry.flags & DeviceEntry::PLAIN != 0 {
        None
    } else if entry.flags & DeviceEntry::NETDEV != 0 {
        Some(&NETDEV_PROGRAMS)
    } else {
        Some(&POD_PROGRAMS)
    }
}

/// Programs of the root cgroup, with `enum bpf_attach_type`.
pub const CGROUP_PROGRAMS: [(&str, u32); 8] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

/// Our place among clsact filters: not the first priority and handle, which other products take for their own.
const PRIORITY: u16 = 3;
const HANDLE: TcHandle = TcHandle::new(0, 0x70a1);

/// How programs get onto interfaces on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// tcx links.
    Tcx,
    /// clsact filters.
    Clsact,
}

impl Way {
    /// By what was asked for and by what the kernel can do: asked, not guessed from its version.
    pub fn choose(mode: AttachMode) -> Result<Self, Error> {
        let has_tcx = match sysbpf::query_tcx(1, attach_type::TCX_INGRESS) {
            Ok(_) => true,
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => false,
            Err(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Error::Denied { operation: "look for tcx programs".to_owned(), source });
            }
            Err(source) => return Err(Error::Attach { program: "tcx", target: "lo".to_owned(), source }),
        };
        match (mode, has_tcx) {
            (AttachMode::Clsact, _) | (AttachMode::Auto, false) => Ok(Self::Clsact),
            (AttachMode::Auto | AttachMode::Tcx, true) => Ok(Self::Tcx),
            (AttachMode::Tcx, false) => Err(Error::NoTcx),
        }
    }
}

fn interface_name(ifindex: u32) -> Result<String, Error> {
    nix::net::if_::if_indextoname(ifindex)
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|_gone| Error::InterfaceGone { ifindex })
}

fn classifier<'a>(ebpf: &'a mut Ebpf, program: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    let found = ebpf.program_mut(program).ok_or(Error::NoProgram { program })?;
    found.try_into().map_err(|source| Error::Program { program, source })
}

/// Attaches both programs of an interface, or swaps those that are there.
pub fn attach(ebpf: &mut Ebpf, pins: &Pins, way: Way, ifindex: u32, programs: &Programs) -> Result<(), Error> {
    // Programs of the other way, from before --attach was changed: both together would translate twice. This is the one
    // moment in which something is detached first.
    if way == Way::Clsact {
        detach_tcx(pins, ifindex, &POD_PROGRAMS)?;
        detach_tcx(pins, ifindex, &NETDEV_PROGRAMS)?;
        return attach_clsact(ebpf, pins, ifindex, programs);
    }
    detach_clsact(pins, ifindex)?;
    // An interface index that has become another kind of interface.
    let other = if programs[0].0 == POD_PROGRAMS[0].0 { &NETDEV_PROGRAMS } else { &POD_PROGRAMS };
    detach_tcx(pins, ifindex, other)?;
    for (program, _, attach_type) in *programs {
        let fd = classifier(ebpf, program)?.fd().map_err(|source| Error::Program { program, source })?;
        let pin = LinkPin::Tcx(program.to_owned(), ifindex);
        if swap(pins, &pin, fd.as_fd())? {
            continue;
        }
        let link = sysbpf::link_create_tcx(fd.as_fd(), ifindex, attach_type).map_err(|source| {
            if source.raw_os_error() == Some(libc::ENODEV) {
                Error::InterfaceGone { ifindex }
            } else {
                Error::Attach { program, target: format!("interface {ifindex}"), source }
            }
        })?;
        pin_link(&link, &pins.link(&pin))?;
    }
    Ok(())
}

/// Swaps the program behind a pinned link. False: there is no link, or its interface is gone; then the pin is removed.
fn swap(pins: &Pins, pin: &LinkPin, program: std::os::fd::BorrowedFd<'_>) -> Result<bool, Error> {
    let path = pins.link(pin);
    if !path.exists() {
        return Ok(false);
    }
    let swapped = sysbpf::obj_get(&path).and_then(|link| sysbpf::link_update(link.as_fd(), program));
    match swapped {
        Ok(()) => Ok(true),
        // ENOLINK: the interface is gone and another has its index by now, or none has.
        Err(e) => {
            tracing::warn!(path = %path.display(), error = %e, "a pinned link cannot be used; it is made anew");
            pins.remove_link(pin)?;
            Ok(false)
        }
    }
}

fn pin_link(link: &OwnedFd, path: &Path) -> Result<(), Error> {
    sysbpf::obj_pin(link.as_fd(), path).map_err(|source| Error::Pin { path: path.to_owned(), source })
}

fn attach_clsact(ebpf: &mut Ebpf, pins: &Pins, ifindex: u32, programs: &Programs) -> Result<(), Error> {
    let name = interface_name(ifindex)?;
    let mark = pins.link(&LinkPin::Clsact(ifindex));
    let attached = mark.exists();
    if !attached {
        make_mark(&mark)?;
    }
    match tc::qdisc_add_clsact(&name) {
        Ok(()) => make_mark(&pins.made_qdisc(ifindex))?,
        Err(TcError::AlreadyAttached) => {}
        // EEXIST: somebody has one; it serves all.
        Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {}
        Err(e) => return Err(Error::Attach { program: "clsact", target: name, source: std::io::Error::other(e) }),
    }
    for (program, direction, _) in *programs {
        let classifier = classifier(ebpf, program)?;
        // The mark is made first and may be all that there is: an agent can be killed at any point.
        let id = if attached {
            replace_filter(classifier, &name, direction).or_else(|_absent| add_filter(classifier, &name, direction))
        } else {
            add_filter(classifier, &name, direction).or_else(|_present| replace_filter(classifier, &name, direction))
        };
        let failed = |source: ProgramError| Error::Program { program, source };
        // A link object of this kind detaches when it is dropped; the filter is to outlive us.
        std::mem::forget(classifier.take_link(id.map_err(failed)?).map_err(failed)?);
    }
    Ok(())
}

fn make_mark(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Pin { path: path.to_owned(), source })
}

fn add_filter(
    classifier: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<SchedClassifierLinkId, ProgramError> {
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() };
    classifier.attach_with_options(interface, direction, TcAttachOptions::Netlink(options))
}

fn replace_filter(
    classifier: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<SchedClassifierLinkId, ProgramError> {
    let link = SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)?;
    classifier.attach_to_link(link)
}

/// Detaches our programs from an interface, which may be gone already.
pub fn detach(pins: &Pins, ifindex: u32) -> Result<(), Error> {
    detach_tcx(pins, ifindex, &POD_PROGRAMS)?;
    detach_tcx(pins, ifindex, &NETDEV_PROGRAMS)?;
    detach_clsact(pins, ifindex)
}

fn detach_tcx(pins: &Pins, ifindex: u32, programs: &Programs) -> Result<(), Error> {
    programs.iter().try_for_each(|(program, ..)| pins.remove_link(&LinkPin::Tcx((*program).to_owned(), ifindex)))
}

fn detach_clsact(pins: &Pins, ifindex: u32) -> Result<(), Error> {
    let mark = LinkPin::Clsact(ifindex);
    if !pins.link(&mark).exists() {
        return Ok(());
    }
    for (_, direction, _) in POD_PROGRAMS {
        if let Ok(name) = interface_name(ifindex)
            && let Ok(link) = SchedClassifierLink::attached(&name, direction, PRIORITY, HANDLE, None)
        {
            // Dropping it deletes the filter.
            drop(link);
        }
    }
    if pins.made_qdisc(ifindex).exists() {
        let removed = Requests::open().and_then(|mut netlink| netlink.remove_unused_clsact(ifindex));
        removed.map_err(|e| Error::Attach {
            program: "clsact",
            target: format!("interface {ifindex}"),
            source: std::io::Error::other(e),
        })?;
    }
    pins.remove_link(&mark)
}

/// Detaches the socket programs from whatever cgroup they are on.
pub fn detach_cgroup(pins: &Pins) -> Result<(), Error> {
    for pin in pins.list_links()?.iter().filter(|pin| matches!(pin, LinkPin::Cgroup(_))) {
        pins.remove_link(pin)?;
    }
    Ok(())
}

/// Attaches the socket programs to a cgroup, or swaps those that are there. Those on another cgroup go.
pub fn attach_cgroup(ebpf: &Ebpf, pins: &Pins, cgroup: &Path) -> Result<(), Error> {
    let opened = |source| Error::Attach { program: "connect4", target: cgroup.display().to_string(), source };
    let directory = fs::File::open(cgroup).map_err(opened)?;
    let id = directory.metadata().map_err(opened)?.ino();
    for (program, attach_type) in CGROUP_PROGRAMS {
        let found = ebpf.program(program).ok_or(Error::NoProgram { program })?;
        let fd = found.fd().map_err(|source| Error::Program { program, source })?;
        let pin = LinkPin::Cgroup(program.to_owned());
        let known = sysbpf::obj_get(&pins.link(&pin)).and_then(|link| sysbpf::link_info(link.as_fd()));
        if known.is_ok_and(|link| link.cgroup != id) {
            pins.remove_link(&pin)?;
        }
        if swap(pins, &pin, fd.as_fd())? {
            continue;
        }
        let link = sysbpf::link_create_cgroup(fd.as_fd(), directory.as_fd(), attach_type)
            .map_err(|source| Error::Attach { program, target: cgroup.display().to_string(), source })?;
        pin_link(&link, &pins.link(&pin))?;
    }
    Ok(())
}
