//! A rank that is not rank 0: it holds its part of everything and does what it is told, in the order it is told. Not
//! here: how it was started (team).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use tandem_core::id::AdapterDigest;
use tandem_kernels::attention::KvCache;
use tch::Tensor;
use tracing::{error, warn};

use super::{Order, StepOrder, decode};
use crate::batch::{self, StepInputs};
use crate::guard::{self, TorchFault};
use crate::lora::adapter::Adapter;
use crate::lora::params::AdapterParams;
use crate::model::Decoder;
use crate::train::Trainer;

pub struct Follower {
    decoder: Decoder,
    cache: KvCache,
    adapters: HashMap<AdapterDigest, Arc<Adapter>>,
    job: Option<Trainer>,
    /// Packed by the job, not yet named: rank 0 names it once it is written, and before the job saves again.
    made: Option<Arc<Adapter>>,
}

impl Follower {
    pub fn new(decoder: Decoder, cache: KvCache) -> Follower {
        Follower {
            decoder,
            cache,
            adapters: HashMap::new(),
            job: None,
            made: None,
        }
    }

    /// Until the replica ends in order, or a rank is lost (this one, when something fails here).
    pub fn follow(mut self) -> Result<(), TorchFault> {
        let _no_grad = tch::no_grad_guard();
        let comm = self.decoder.comm().clone();
        loop {
            let orders: Vec<Order> = guard::torch(|| decode(&comm.broadcast(vec![])))?;
            for order in orders {
                if guard::torch(|| self.obey(order))?.is_break() {
                    // So that rank 0 leaves no sooner than it was heard. If it has left, that is the end as well.
                    let _ = guard::torch(|| comm.meet());
                    return Ok(());
                }
            }
        }
    }

    fn obey(&mut self, order: Order) -> ControlFlow<()> {
        match order {
            Order::Step(step) => self.step(&step),
            Order::Admit {
                digest,
                shape,
                numbers,
            } => {
                let flat = Tensor::from_slice(&numbers);
                let adapter = self.packed(&AdapterParams { flat, shape });
                self.adapters.insert(digest, Arc::new(adapter));
            }
            Order::Publish(digest) => {
                let made = self.made.take().expect("the job packed what is published");
                self.adapters.insert(digest, made);
            }
            Order::Evict(digest) => drop(self.adapters.remove(&digest)),
            Order::StartJob(spec, inputs) => {
                let started = Trainer::start_with(*spec, &inputs, self.decoder.fit());
                // Rank 0 began with the same inputs.
                self.job =
                    Some(started.unwrap_or_else(|error| panic!("the job does not start here: {error}")));
            }
            Order::Quantum => self.quantum(),
            Order::EndJob => self.job = None,
            Order::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn step(&self, order: &StepOrder) {
        let find = |digest| match self.adapters.get(&digest) {
            Some(adapter) => adapter.as_ref(),
            None => panic!("adapter {} is planned but not here", digest.short()),
        };
        let inputs = StepInputs::new(order.step(), find);
        let hidden = self.decoder.forward(&inputs.batch(&self.cache));
        for rows in &order.heads {
            // Rank 0 reads the logits.
            drop(self.decoder.head(&batch::select(&hidden, rows)));
        }
    }

    fn quantum(&mut self) {
        let Some(job) = &mut self.job else {
            panic!("a quantum of a job that is not here")
        };
        let packed = job
            .quantum(Some(&self.decoder))
            .and_then(|quantum| match quantum.snapshot {
                Some(snapshot) => snapshot.packed(),
                None => Ok(None),
            });
        match packed {
            Ok(Some(adapter)) => self.made = Some(adapter),
            Ok(None) => {}
            // Numbers are the same on every rank, so rank 0 fails the job for the same reason; it says so next.
            Err(error) => warn!(job = %job.spec().id, %error, "training failed"),
        }
    }

    fn packed(&self, params: &AdapterParams) -> Adapter {
        self.decoder.fit().pack(params).unwrap_or_else(|error| {
            error!(%error, "an adapter does not fit here");
            panic!("an adapter does not fit here: {error}")
        })
    }
}
