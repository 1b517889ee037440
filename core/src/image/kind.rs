//! The table of record kinds: feeds writer, reader and `inspect`.

use super::records;
use prost::{Message, Name};

/// A message that is a record of its own.
pub trait Record: Message + Name + Default {
    /// Its kind.
    const KIND: RecordKind;
}

macro_rules! record_kinds {
    ($($(#[doc = $doc:literal])* $number:literal $kind:ident $name:literal $version:literal $message:ident;)*) => {
        /// What a framed record holds. The numbers are part of the format: appended, never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum RecordKind { $($(#[doc = $doc])* $kind = $number,)* }

        impl RecordKind {
            /// All kinds, in order of their numbers.
            pub const ALL: &[RecordKind] = &[$(RecordKind::$kind,)*];

            /// The kind with this number.
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$kind),)* _ => None }
            }

            /// Name for messages and for `inspect`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }

            /// The version of the record's meaning that this program writes; it reads this one and older ones.
            pub fn version(self) -> u16 {
                match self { $(Self::$kind => $version,)* }
            }

            /// Full protobuf name of the message.
            pub fn message(self) -> String {
                match self { $(Self::$kind => records::$message::full_name(),)* }
            }
        }

        $(impl Record for records::$message {
            const KIND: RecordKind = RecordKind::$kind;
        })*
    };
}

record_kinds! {
    /// What a reader must know first; the first record.
    1 Header "header" 1 Header;
    /// A process.
    2 Task "task" 1 Task;
    /// A memory descriptor.
    3 MemoryMap "memory map" 1 MemoryMap;
    /// A file that is mapped.
    4 MappedFile "mapped file" 1 MappedFile;
    /// A shared anonymous segment.
    5 SharedSegment "shared segment" 1 SharedSegment;
    /// Where the pages of a memory map or segment are; several of one owner continue each other.
    6 PageMap "page map" 1 PageMap;
    /// A page file.
    7 Shard "page file" 1 Shard;
    /// A descriptor table.
    8 DescriptorTable "descriptor table" 1 DescriptorTable;
    /// An open file description.
    9 Handle "handle" 1 Handle;
    /// A resource that a plugin dumped.
    10 Object "object" 1 Object;
    /// A namespace of the image.
    11 Namespace "namespace" 1 NamespaceObject;
    /// State that a Task hook keeps.
    12 TaskRecord "task record" 1 TaskRecord;
    /// A piece of a blob; in `blobs.img` only.
    13 Blob "blob" 1 BlobChunk;
    /// The last record of a file.
    14 Trailer "trailer" 1 Trailer;
    /// A file without its name.
    15 GhostFile "ghost file" 1 GhostFile;
}
