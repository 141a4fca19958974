//! Which NICs the agent attaches to.

use super::Usage;

/// The NICs to attach to: those of the command line, else those of the configuration, each once.
///
/// # Errors
/// [`Usage`], with the machine's interfaces, if both are empty.
pub fn choose_interfaces(flags: &[String], configured: &[String]) -> Result<Vec<String>, Usage> {
    let named = if flags.is_empty() { configured } else { flags };
    let mut chosen: Vec<String> = Vec::with_capacity(named.len());
    for name in named {
        if !chosen.contains(name) {
            chosen.push(name.clone());
        }
    }
    if chosen.is_empty() { Err(none_named(&machine_interfaces())) } else { Ok(chosen) }
}

fn none_named(present: &[String]) -> Usage {
    let example = present.first().map_or("eth0", String::as_str);
    let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
    Usage(format!(
        "no interface to attach to: name one with --iface, or with `interfaces` in [agent] of the \
         configuration\n  this machine has: {present}\n  for example: sudo lb-userspace --iface \
         {example}"
    ))
}

/// The machine's interfaces but the loopback, in the kernel's order; none if they cannot be read.
fn machine_interfaces() -> Vec<String> {
    let Ok(interfaces) = nix::net::if_::if_nameindex() else { return Vec::new() };
    interfaces
        .iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .filter(|name| name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_flag_wins_over_the_configuration() {
        let chosen = choose_interfaces(&names(&["eth1"]), &names(&["eth0"])).unwrap();
        assert_eq!(chosen, ["eth1"]);
        let chosen = choose_interfaces(&[], &names(&["eth0"])).unwrap();
        assert_eq!(chosen, ["eth0"]);
    }

    #[test]
    fn a_name_given_twice_is_attached_once() {
        let chosen = choose_interfaces(&names(&["b", "a", "b"]), &[]).unwrap();
        assert_eq!(chosen, ["b", "a"]);
    }

    #[test]
    fn naming_none_lists_what_there_is() {
        assert!(choose_interfaces(&[], &[]).is_err());
        insta::assert_snapshot!(none_named(&names(&["ens3", "ens4"])));
    }

    #[test]
    fn the_loopback_is_no_suggestion() {
        assert!(!machine_interfaces().contains(&"lo".to_owned()));
    }
}
