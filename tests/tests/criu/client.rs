//! A client of CRIU's protocol, as runc has one: the same numbers, written down independently of the tool's.

use super::expect;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair},
};
use prost::Message;
use stasis_tests::{
    scenario::{Doing, Failure},
    tool::Tool,
};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

pub const DUMP: i32 = 1;
pub const RESTORE: i32 = 2;
pub const CHECK: i32 = 3;
pub const PRE_DUMP: i32 = 4;
pub const NOTIFY: i32 = 6;
pub const FEATURE_CHECK: i32 = 9;
pub const VERSION: i32 = 10;

#[derive(Clone, PartialEq, Message)]
pub struct Req {
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub opts: Option<Opts>,
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Opts {
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    #[prost(string, optional, tag = "51")]
    pub config_file: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct InheritFd {
    #[prost(string, required, tag = "1")]
    pub key: String,
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Features {
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resp {
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    #[prost(message, optional, tag = "3")]
    pub dump: Option<DumpResp>,
    #[prost(message, optional, tag = "4")]
    pub restore: Option<RestoreResp>,
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
    #[prost(message, optional, tag = "10")]
    pub version: Option<Version>,
}

#[derive(Clone, PartialEq, Message)]
pub struct DumpResp {
    #[prost(bool, optional, tag = "1")]
    pub restored: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RestoreResp {
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Notify {
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Version {
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
}

/// The tool, serving us.
pub struct Server {
    socket: OwnedFd,
    child: Child,
}

impl Server {
    /// Starts it with its end of a socket as descriptor `theirs`; `script` runs in the shell that becomes it, as in libcriu's child.
    pub fn start(tool: &Tool, output: &Path, script: Option<&str>) -> Result<Self, Failure> {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .doing("making sockets")?;
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).doing("letting the socket through")?;
        let number = theirs.as_raw_fd().to_string();
        let file = File::create(output).doing("making the output file")?;
        let mut command = match script {
            None => {
                let mut command = Command::new(&tool.bin);
                command.args(["swrk", &number]);
                command
            }
            Some(script) => {
                let mut command = Command::new("/usr/bin/python3");
                command.args(["-c", script, &number]).arg(&tool.bin);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(file.try_clone().doing("sharing the output file")?).stderr(file);
        let child = command.spawn().doing("starting criu swrk")?;
        Ok(Self { socket, child })
    }

    /// What we have sent.
    pub fn send(&self, request: &Req) -> Result<(), Failure> {
        let sent = send(self.socket.as_raw_fd(), &request.encode_to_vec(), MsgFlags::MSG_NOSIGNAL);
        sent.map(drop).doing("sending a request")
    }

    /// A packet as it comes.
    pub fn receive_bytes(&self) -> Result<Vec<u8>, Failure> {
        let mut packet = vec![0; 1 << 16];
        let n = recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::empty()).doing("receiving")?;
        packet.truncate(n);
        Ok(packet)
    }

    /// The next answer.
    pub fn receive(&self) -> Result<Resp, Failure> {
        Resp::decode(&self.receive_bytes()?[..]).map_err(io::Error::other).doing("decoding an answer")
    }

    /// Sends a request and answers notifications until its answer comes; gives the notifications.
    pub fn ask(&self, request: &Req, refuse: Option<&str>) -> Result<(Resp, Vec<Notify>), Failure> {
        self.send(request)?;
        let mut notified = Vec::new();
        loop {
            let answer = self.receive()?;
            if answer.kind != NOTIFY {
                return Ok((answer, notified));
            }
            let notify = answer.notify.unwrap_or_default();
            let good = refuse.is_none_or(|name| notify.script.as_deref() != Some(name));
            self.send(&Req { kind: NOTIFY, notify_success: Some(good), ..Req::default() })?;
            notified.push(notify);
        }
    }

    /// As runc ends it: no more from our side, and then it is to end by itself.
    pub fn end(mut self) -> Result<ExitStatus, Failure> {
        shutdown(self.socket.as_raw_fd(), Shutdown::Write).doing("shutting down")?;
        self.child.wait().doing("waiting for criu swrk")
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

/// The names in order.
pub fn names(notified: &[Notify]) -> Vec<&str> {
    notified.iter().map(|notify| notify.script.as_deref().unwrap_or("?")).collect()
}

/// Fails unless the answer is a success of this kind.
pub fn succeeded(answer: &Resp, kind: i32) -> Result<(), Failure> {
    expect(answer.kind == kind && answer.success, || format!("{answer:?}"))
}
