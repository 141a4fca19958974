//! The queueing discipline that programs on the way out hang on, where the kernel has no TCX
//! (before 6.6).

use anyhow::Context as _;
use aya::programs::TcAttachType;
use aya::programs::tc::{self, TcError};
use rtnetlink::packet_route::tc::TcHandle;
use tracing::debug;

/// `TC_H_CLSACT`, which is also `TC_H_INGRESS` (linux/pkt_sched.h).
const PARENT: u32 = 0xffff_fff1;
/// The handle that the kernel gives the discipline.
const HANDLE: u32 = 0xffff_0000;

/// Makes a NIC ready; whether the discipline was added. A program of this name that a killed agent
/// left there goes.
///
/// # Errors
/// What the kernel says.
pub fn add(interface: &str, program: &str) -> anyhow::Result<bool> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => Ok(true),
        Err(TcError::AlreadyAttached) => {
            if tc::qdisc_detach_program(interface, TcAttachType::Egress, program).is_ok() {
                debug!(interface, "removed the program that a former run had left");
            }
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| {
            format!("no clsact queueing discipline on {interface} (kernel option NET_SCH_INGRESS)")
        }),
    }
}

/// Takes the discipline back from a NIC.
///
/// # Errors
/// What the kernel says.
pub async fn remove(ifindex: u32) -> anyhow::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let mut request = handle.qdisc().del(i32::try_from(ifindex)?);
    request.message_mut().header.parent = TcHandle::from(PARENT);
    request.message_mut().header.handle = TcHandle::from(HANDLE);
    let result = request.execute().await;
    connection.abort();
    result.context("remove the clsact queueing discipline")
}
