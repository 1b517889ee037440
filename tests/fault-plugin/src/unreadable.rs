//! The plugin's record, which can be written so that nobody can read it back.

use prost::bytes::{Buf, BufMut};
use prost::encoding::{DecodeContext, WireType};
use prost::{DecodeError, Message, Name};

use crate::records::stasis::fault::v1::Quiet as Sound;

/// A sound record, or one that is not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Quiet {
    /// What is in it.
    pub sound: Sound,
    /// Whether it is written wrongly.
    pub unreadable: bool,
}

/// A field of the type of `flags` that ends in the middle of its number.
const JUNK: [u8; 2] = [0x08, 0xff];

impl Message for Quiet {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        match self.unreadable {
            true => buffer.put_slice(&JUNK),
            false => self.sound.encode_raw(buffer),
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        self.sound.merge_field(tag, wire_type, buffer, context)
    }

    fn encoded_len(&self) -> usize {
        if self.unreadable { JUNK.len() } else { self.sound.encoded_len() }
    }

    fn clear(&mut self) {
        self.sound.clear();
    }
}

impl Name for Quiet {
    const NAME: &'static str = Sound::NAME;
    const PACKAGE: &'static str = Sound::PACKAGE;
}
