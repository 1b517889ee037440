//! What the user says of the outside: `--external net[INODE]:KEY`, `--external veth[INSIDE]:OUTSIDE@BRIDGE`,
//! `--external macvlan[INSIDE]:OUTSIDE`, `--empty-ns net`, `--join-ns net:PATH`.

use stasis_plugin_api::Host;

/// Where a device leads to outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct External {
    pub name: String,
    pub bridge: Option<String>,
}

/// What is in the brackets of a key of a type, and what is after it.
fn parse<'a>(text: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    let (inside, rest) = text.strip_prefix(kind)?.strip_prefix('[')?.split_once(']')?;
    Some((inside, rest.strip_prefix(':').unwrap_or(rest)))
}

/// The key of a namespace that stays outside.
pub(crate) fn of(host: &Host<'_>, ino: u64) -> Option<String> {
    let externals = host.externals();
    let key = externals.iter().find_map(|text| {
        let (number, key) = parse(text, "net")?;
        (number.parse() == Ok(ino)).then(|| key.to_owned())
    });
    key.filter(|key| !key.is_empty())
}

/// What the user wants on the other side of a device. Of several the last one counts.
pub(crate) fn of_device(host: &Host<'_>, kind: &str, name: &str) -> Option<External> {
    host.externals().iter().rev().find_map(|text| {
        let (inside, outside) = parse(text, kind)?;
        if inside != name || outside.is_empty() {
            return None;
        }
        let (name, bridge) = match outside.split_once('@') {
            Some((name, bridge)) => (name, Some(bridge.to_owned()).filter(|bridge| !bridge.is_empty())),
            None => (outside, None),
        };
        Some(External { name: name.to_owned(), bridge })
    })
}

/// Whether the value of `--empty-ns` names network namespaces.
pub(crate) fn names_net(value: &str) -> bool {
    value.split(',').any(|kind| kind.trim() == "net")
}

/// The path in the value of `--join-ns` (`net:PATH`).
pub(crate) fn path_to_join(value: &str) -> Option<&str> {
    value.split(',').find_map(|one| one.trim().strip_prefix("net:")).filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    #[test]
    fn keys_are_read_and_stale_ones_ignored() {
        let mut kit = Kit::new();
        kit.host.externals =
            ["veth[eth0]:old", "veth[eth0]:vethX@br0", "net[42]:outer", "veth[eth1", "tty[1:2]", "net[7]"]
                .map(Into::into)
                .to_vec();
        let found = |name: &str| kit.with_host(|host| Ok(of_device(host, "veth", name))).unwrap();
        assert_eq!(found("eth0"), Some(External { name: "vethX".into(), bridge: Some("br0".into()) }));
        assert_eq!(found("eth1"), None);
        let key = |ino| kit.with_host(|host| Ok(of(host, ino))).unwrap();
        assert_eq!(key(42), Some("outer".into()));
        assert_eq!(key(7), None);
        assert_eq!(path_to_join("net:/run/netns/x"), Some("/run/netns/x"));
        assert_eq!(path_to_join("pid:/x"), None);
        assert!(names_net("net") && !names_net("netx"));
    }
}
