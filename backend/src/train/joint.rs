//! Slices of several who train in one pass: the base's products read its weights once for all of them, forward and back. Each
//! one's rows have their own adapter, dropout and gradient, and a row's numbers do not depend on the rows beside it, so jobs and
//! clients' calls come to the same bytes alone and with others. Who leaves while a slice is on its way leaves it with the pass:
//! nobody else has to begin anew. Not here: who goes together (turns).

use serde::{Deserialize, Serialize};
use tandem_core::id::JobId;
use tandem_core::learner::LearnerId;
use tandem_kernels::loss::LogProbs;

use super::pass::{Advanced, Context, Entry, KEEP_BYTES, Learns, Pass, Scored};
use crate::model::Decoder;

/// Who trains.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Who {
    Job(JobId),
    Learner(LearnerId),
}

/// Who gives slices to passes that others share.
pub trait Member: Send {
    /// The slice that goes into a pass with the next quantum, alone or with those of others. None where something else is
    /// next.
    fn next_slice(&self) -> Option<Next<'_>>;
    /// It goes with others.
    fn lend(&mut self);
    fn learns(&self) -> Learns<'_>;
    /// The derivative of what is minimised by each log-probability of its slice's labels, where they are to be weighed.
    fn weigh(&mut self, log_probs: &[f32]) -> Vec<f32>;
    /// Its slice went forward and back with others.
    fn take_back(&mut self, found: &LogProbs);
    /// Rows of the slice that is next or on its way.
    fn slice_rows(&self) -> usize;

    /// Rows of the slice that goes into a pass with the next quantum.
    fn next_rows(&self) -> Option<usize> {
        self.next_slice().map(|next| next.entry.0.tokens.len())
    }
}

/// A slice that is next.
pub struct Next<'a> {
    pub entry: Entry<'a>,
    /// Else its labels are scored and then weighed.
    pub is_weighed: bool,
}

pub struct Joint {
    members: Vec<Place>,
    pass: Pass,
}

enum Place {
    Here(Who),
    /// It left. What its rows add to nobody reads.
    Left(Box<dyn Member>),
}

/// One quantum of `members` together: a sublayer, or some labels, further; without `joint` the next slice of each goes in.
/// They are those of `joint` that have not left, in its order. `joint` is gone when they are through.
pub fn quantum(joint: &mut Option<Joint>, members: &mut [(Who, &mut dyn Member)], base: &Decoder) {
    let _no_grad = tch::no_grad_guard();
    *joint = match joint.take() {
        Some(joint) => joint.advance(members, base),
        None => Some(Joint::begin(members, base)),
    };
}

impl Joint {
    fn begin(members: &mut [(Who, &mut dyn Member)], base: &Decoder) -> Joint {
        let next = members.iter().map(|(_, member)| member.next_slice());
        let next: Vec<Next> = next.map(|next| next.expect("who joins has a slice")).collect();
        let entries: Vec<Entry> = next.iter().map(|next| next.entry).collect();
        let later = (0..next.len()).filter(|&i| !next[i].is_weighed);
        let learns: Vec<Learns> = members.iter().map(|(_, member)| member.learns()).collect();
        let pass = Pass::enter(&entries, &context(&learns, base)).to_be_weighed(later);
        members.iter_mut().for_each(|(_, member)| member.lend());
        let place = |(who, _): &(Who, _)| Place::Here(who.clone());
        Joint {
            members: members.iter().map(place).collect(),
            pass,
        }
    }

    fn advance(self, members: &mut [(Who, &mut dyn Member)], base: &Decoder) -> Option<Joint> {
        let Joint {
            members: mut places,
            pass,
        } = self;
        let mut here = members.iter_mut();
        let mut all: Vec<&mut dyn Member> = vec![];
        for place in &mut places {
            all.push(match place {
                Place::Left(member) => member.as_mut(),
                Place::Here(who) => {
                    let (same, member) = here.next().expect("a pass ends with those it began with");
                    assert_eq!(who, same, "a pass goes on in its order");
                    &mut **member
                }
            });
        }
        let advanced = {
            let learns: Vec<Learns> = all.iter().map(|member| member.learns()).collect();
            pass.advance(&context(&learns, base))
        };
        let pass = match advanced {
            Advanced::On(pass) => pass,
            Advanced::Scored(scored) => weighed(scored, &mut all),
            Advanced::Through(found) => {
                all.iter_mut()
                    .zip(&found)
                    .for_each(|(member, found)| member.take_back(found));
                return None;
            }
        };
        Some(Joint {
            members: places,
            pass,
        })
    }

    /// Those that have not left.
    pub fn members(&self) -> impl Iterator<Item = &Who> {
        self.members.iter().filter_map(|place| match place {
            Place::Here(who) => Some(who),
            Place::Left(_) => None,
        })
    }
}

fn weighed(scored: Scored, members: &mut [&mut dyn Member]) -> Pass {
    let derivatives = scored
        .by_slice()
        .map(|(i, log_probs)| members[i].weigh(log_probs));
    let derivatives: Vec<Vec<f32>> = derivatives.collect();
    scored.weighed(&derivatives.concat())
}

/// `who` leaves: where its slice is on its way with others, `member` stays with the pass to its end.
pub fn leave(joint: &mut Option<Joint>, who: &Who, member: Box<dyn Member>) {
    let Some(pass) = joint else { return };
    let is_it = |place: &&mut Place| matches!(place, Place::Here(here) if here == who);
    if let Some(place) = pass.members.iter_mut().find(is_it) {
        *place = Place::Left(member);
    }
    if pass.members().next().is_none() {
        *joint = None;
    }
}

fn context<'a>(learns: &'a [Learns<'a>], decoder: &'a Decoder) -> Context<'a> {
    Context {
        decoder,
        learns,
        keep_bytes: KEEP_BYTES,
    }
}
