//! A connection of our own to the server, to ask about the others.

use stasis_plugin_api::{HookError, Result};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
};

/// The server, as a client sees it.
pub struct Server(BufReader<UnixStream>);

fn failed(error: std::io::Error) -> HookError {
    HookError::failed("asking the redis server", error)
}

impl Server {
    /// Connects to it.
    pub fn connect(path: &str) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(super::PATIENCE)).map_err(failed)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Refuses if any client of the server has a state there that would be lost: the server does not tell which is whose.
    pub fn clients_have_no_state(mut self, label: &str) -> Result<()> {
        self.0.get_mut().write_all(b"CLIENT LIST\r\n").map_err(failed)?;
        let mut head = String::new();
        self.0.read_line(&mut head).map_err(failed)?;
        let length = head.strip_prefix('$').and_then(|length| length.trim().parse::<u64>().ok());
        let Some(length) = length else {
            let remedy = "let it be asked without a password";
            return Err(HookError::unsupported(label, format!("the server says {:?}", head.trim()), remedy));
        };
        let mut list = String::new();
        self.0.take(length).read_to_string(&mut list).map_err(failed)?;
        match list.lines().find_map(state) {
            None => Ok(()),
            Some(state) => {
                let why = format!("a client of the server has a state there that would be lost: {state}");
                Err(HookError::unsupported(label, why, "end what it has begun, or its connection"))
            }
        }
    }
}

/// A field of a client that differs from that of a new connection (redis.io, CLIENT LIST). "U" says that it came over a unix
/// socket.
fn state(client: &str) -> Option<&str> {
    client.split(' ').find(|field| {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        match name {
            "flags" => !matches!(value, "N" | "U"),
            "db" | "sub" | "psub" | "ssub" | "watch" => value != "0",
            "multi" => value != "-1",
            "resp" => value != "2",
            "user" => value != "default",
            "name" => !value.is_empty(),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told() {
        let plain = "id=7 addr=/x:0 name= age=0 flags=U db=0 sub=0 psub=0 multi=-1 cmd=client|list user=default resp=2";
        assert_eq!(state(plain), None);
        assert_eq!(state(&plain.replace("db=0", "db=3")), Some("db=3"));
        assert_eq!(state(&plain.replace("flags=U", "flags=xU")), Some("flags=xU"));
        assert_eq!(state(&plain.replace("name=", "name=me")), Some("name=me"));
    }
}
