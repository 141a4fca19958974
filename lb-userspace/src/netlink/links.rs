//! Reading links.

use std::collections::BTreeMap;
use std::io;

use futures::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkLayerType, LinkMessage, LinkXdp, VlanProtocol, XdpAttached,
};
use rtnetlink::Handle;

use super::io_error;
use super::network::{Interface, LinkLayer, Vlan, XdpAttachment, XdpAttachmentMode};

/// The links of this moment, by interface index, for checks before anything is followed.
///
/// Must be called within a tokio runtime.
///
/// # Errors
/// When the kernel gives no netlink socket or does not answer.
pub async fn read_interfaces() -> io::Result<BTreeMap<u32, Interface>> {
    let (connection, handle, _messages) = rtnetlink::new_connection()?;
    // Ends by itself once the handle is dropped.
    tokio::spawn(connection);
    read(&handle).await
}

pub(super) async fn read(handle: &Handle) -> io::Result<BTreeMap<u32, Interface>> {
    handle
        .link()
        .get()
        .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
        .execute()
        .map_err(io_error)
        .map_ok(|message| interface(&message))
        .map_ok(|interface| (interface.index, interface))
        .try_collect()
        .await
}

fn interface(message: &LinkMessage) -> Interface {
    let header = &message.header;
    let mut interface = Interface {
        index: header.index,
        name: String::new(),
        layer: match header.link_layer_type {
            LinkLayerType::Ether => LinkLayer::Ethernet,
            LinkLayerType::Loopback => LinkLayer::Loopback,
            _ => LinkLayer::Other,
        },
        mac: [0; 6],
        mtu: 0,
        up: header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        vlan: None,
        controller: None,
        lower: None,
        xdp: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac = mac_address(mac).unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Controller(index) => interface.controller = Some(*index),
            LinkAttribute::LinkInfo(info) => {
                interface.vlan = vlan(info, &message.attributes);
                interface.lower = lower(info, &message.attributes);
            }
            LinkAttribute::Xdp(xdp) => interface.xdp = xdp_attachment(xdp),
            _ => {}
        }
    }
    interface
}

/// `None` for hardware addresses that are not Ethernet's.
pub(super) fn mac_address(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok()
}

fn vlan(info: &[LinkInfo], attributes: &[LinkAttribute]) -> Option<Vlan> {
    let data = info.iter().find_map(|item| match item {
        LinkInfo::Data(InfoData::Vlan(data)) => Some(data),
        _ => None,
    })?;
    let id = data.iter().find_map(|item| match item {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })?;
    let parent = lower(info, attributes)?;
    let service_tag = data.contains(&InfoVlan::Protocol(VlanProtocol::Ieee8021Ad));
    Some(Vlan { parent, id, service_tag })
}

/// Other kinds of links carry IFLA_LINK with other meanings, a veth its peer's index.
fn lower(info: &[LinkInfo], attributes: &[LinkAttribute]) -> Option<u32> {
    let shares_frames = |item: &LinkInfo| {
        matches!(item, LinkInfo::Kind(InfoKind::Vlan | InfoKind::MacVlan | InfoKind::MacVtap))
    };
    info.iter().any(shares_frames).then_some(())?;
    attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(lower) => Some(*lower),
        _ => None,
    })
}

fn xdp_attachment(xdp: &[LinkXdp]) -> Option<XdpAttachment> {
    let attached = xdp.iter().find_map(|item| match item {
        LinkXdp::Attached(attached) => Some(*attached),
        _ => None,
    })?;
    let of_mode = |mode| xdp.iter().find_map(|item| program_in(item, mode));
    let attachment = |mode| {
        // Kernels before 4.15 name the program without its mode.
        let program_id = of_mode(mode).or_else(|| xdp.iter().find_map(program))?;
        Some(XdpAttachment { mode, program_id })
    };
    match attached {
        XdpAttached::Driver => attachment(XdpAttachmentMode::Native),
        XdpAttached::SocketBuffer => attachment(XdpAttachmentMode::Generic),
        XdpAttached::Hardware => attachment(XdpAttachmentMode::Offload),
        XdpAttached::Multiple => {
            [XdpAttachmentMode::Offload, XdpAttachmentMode::Native, XdpAttachmentMode::Generic]
                .into_iter()
                .find_map(|mode| Some(XdpAttachment { mode, program_id: of_mode(mode)? }))
        }
        _ => None,
    }
}

fn program(item: &LinkXdp) -> Option<u32> {
    match item {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    }
}

fn program_in(item: &LinkXdp, mode: XdpAttachmentMode) -> Option<u32> {
    match (item, mode) {
        (LinkXdp::DrvProgId(id), XdpAttachmentMode::Native)
        | (LinkXdp::SkbProgId(id), XdpAttachmentMode::Generic)
        | (LinkXdp::HwProgId(id), XdpAttachmentMode::Offload) => Some(*id),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = attributes;
        message
    }

    #[test]
    fn a_vlan_device_names_its_parent() {
        let info = LinkInfo::Data(InfoData::Vlan(vec![
            InfoVlan::Protocol(VlanProtocol::Ieee8021Q),
            InfoVlan::Id(10),
        ]));
        let parsed = interface(&message(vec![
            LinkAttribute::IfName("eth0.10".into()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::Link(2),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vlan), info]),
        ]));
        assert_eq!(parsed.vlan, Some(Vlan { parent: 2, id: 10, service_tag: false }));
        assert_eq!(parsed.name, "eth0.10");
        assert_eq!(parsed.mac, [2, 0, 0, 0, 0, 1]);
        assert_eq!((parsed.index, parsed.mtu, parsed.up), (7, 1500, true));
    }

    #[test]
    fn the_peer_of_a_veth_is_no_lower_device() {
        let of_kind = |kind| {
            let info = LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
            interface(&message(vec![LinkAttribute::Link(2), info]))
        };
        let veth = of_kind(InfoKind::Veth);
        assert_eq!((veth.vlan, veth.lower), (None, None));
        assert_eq!(of_kind(InfoKind::MacVlan).lower, Some(2));
        assert_eq!(of_kind(InfoKind::MacVtap).lower, Some(2));
    }

    #[test]
    fn a_port_names_its_bridge() {
        let port = interface(&message(vec![LinkAttribute::Controller(9)]));
        assert_eq!(port.controller, Some(9));
    }

    #[test]
    fn without_a_carrier_a_link_is_not_up() {
        let mut message = message(Vec::new());
        message.header.flags = LinkFlags::Up;
        assert!(!interface(&message).up);
    }

    #[test]
    fn the_xdp_program_and_its_mode_are_read() {
        let attached = |items| interface(&message(vec![LinkAttribute::Xdp(items)])).xdp;
        assert_eq!(attached(vec![LinkXdp::Attached(XdpAttached::None)]), None);
        assert_eq!(
            attached(vec![
                LinkXdp::Attached(XdpAttached::SocketBuffer),
                LinkXdp::ProgId(4),
                LinkXdp::SkbProgId(4),
            ]),
            Some(XdpAttachment { mode: XdpAttachmentMode::Generic, program_id: 4 })
        );
        assert_eq!(
            attached(vec![
                LinkXdp::Attached(XdpAttached::Multiple),
                LinkXdp::SkbProgId(4),
                LinkXdp::DrvProgId(5),
            ]),
            Some(XdpAttachment { mode: XdpAttachmentMode::Native, program_id: 5 })
        );
    }
}
