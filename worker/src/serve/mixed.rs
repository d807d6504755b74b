//! Answers of heads that read several bases: the first pool makes the answer, the others follow it, and what they see of its tokens is carried to it.
//!
//! Every pool keeps memory for the whole sequence from its beginning, so they are asked one after the other, always in the same order whatever the head:
//! two answers never wait for each other. Only when all have begun does anything run.

use std::pin::pin;
use std::sync::Arc;

use carryon_crds::wire::{Identity, ModelDescription};
use futures::future::try_join_all;
use futures::stream::{BoxStream, unfold};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::ServeError;
use super::gateway::{Events, START_PATIENCE, patiently};
use super::models::{Head, Models};
use crate::exchange::client::{Following, Sending};
use crate::exchange::mixing::{FollowRequest, FollowTokens, TapRows};
use crate::exchange::wire::{GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, PoolClient};

/// Where a pool stands among those of an answer, the same for all gateways: by its base, and of two of one base by where it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(String, Vec<String>);

impl Turn {
    /// Of the pool behind `urls`.
    pub(super) fn new(identity: &Identity, urls: &[String]) -> Self {
        Self(identity.digest(), urls.to_vec())
    }
}

/// A pool beside the first one.
pub(super) struct OtherPool {
    /// When it is asked, among others.
    turn: Turn,
    model: ModelDescription,
    client: PoolClient,
}

/// The pools beside the first one, in the order of `--other-pool`.
pub(super) struct OtherPools(Vec<OtherPool>);

impl OtherPools {
    /// Waits for the pools behind `urls`, and verifies that they run the further bases of every head that reads several.
    pub(super) async fn connect(
        urls: &[String],
        models: &Models,
        namespace: &str,
        patience: std::time::Duration,
    ) -> Result<Self, ServeError> {
        let mut pools = Vec::with_capacity(urls.len());
        for url in urls {
            let asking = PoolClient::connect(std::slice::from_ref(url), START_PATIENCE)?;
            let model = patiently(|| asking.describe()).await?;
            let client = PoolClient::connect(std::slice::from_ref(url), patience)?.bound_to(&model.identity, None).speaking_for(namespace);
            let turn = Turn::new(&model.identity, std::slice::from_ref(url));
            pools.push(OtherPool { turn, model, client });
        }
        models.heads().try_for_each(|head| fits(head, pools.iter().map(|pool| &pool.model)))?;
        Ok(Self(pools))
    }

    /// Longest sequence that all of them take.
    pub(super) fn max_model_len(&self) -> Option<u32> {
        self.0.iter().map(|pool| pool.model.limits.max_model_len).min()
    }

    /// Starts an answer of `head`, which reads them all, at `endpoint` or the next pod of the `first` pool.
    pub(super) async fn generate(
        &self,
        first: (&PoolClient, &Turn),
        head: &Head,
        endpoint: Option<&Endpoint>,
        request: &GenerateRequest,
    ) -> Result<Events, ClientError> {
        let shape = &head.artifact.shape;
        let widths: Arc<[usize]> = shape.tap_widths().split_off(shape.taps.count()).into();
        let mut order: Vec<(&Turn, Option<usize>)> = vec![(first.1, None)];
        order.extend(self.0.iter().enumerate().map(|(place, pool)| (&pool.turn, Some(place))));
        order.sort();
        let (mut answer, mut following) = (None, Vec::with_capacity(self.0.len()));
        for (_, place) in order {
            let Some(place) = place else {
                answer = Some(first.0.generate_mixed(endpoint, request, &widths).await?);
                continue;
            };
            let read = &shape.others[place];
            let follow = FollowRequest { prompt: request.prompt.clone(), max_tokens: request.max_tokens, taps: read.taps.clone() };
            following.push((place, self.0[place].client.follow(&follow, read.hidden_size as usize).await?));
        }
        following.sort_unstable_by_key(|(place, _)| *place);
        let (told, following): (Vec<_>, Vec<_>) = following.into_iter().map(|(_, pool)| pool).unzip();
        // The first pool is one of them.
        let Some((rows, events)) = answer else { return Ok(futures::stream::empty().boxed()) };
        let (out, made) = unbounded_channel();
        let mut making = JoinSet::new();
        making.spawn(make(events.boxed(), told, carry(following, rows, widths), out));
        // Dropped, it ends the answer in all pools.
        let events = unfold((made, making), async |(mut made, making)| Some((made.recv().await?, (made, making))));
        Ok(events.boxed())
    }
}

/// Refuses a head whose further bases are not those of the pools.
fn fits<'a>(head: &Head, pools: impl ExactSizeIterator<Item = &'a ModelDescription>) -> Result<(), ServeError> {
    let (others, found) = (&head.artifact.base.others, pools.len());
    if others.is_empty() && head.artifact.shape.others.is_empty() {
        return Ok(());
    }
    if others.len() != found || head.artifact.shape.others.len() != found {
        return Err(ServeError::OtherPools { head: head.name.clone(), trained_on: others.len(), found });
    }
    if head.artifact.shape.task.is_pooled() {
        return Err(ServeError::MixedTask { head: head.name.clone(), task: head.artifact.shape.task });
    }
    for (base, model) in others.iter().zip(pools) {
        if let Some(member) = base.identity.difference(&model.identity) {
            let (head, trained_on, pool) = (head.name.clone(), base.name.clone(), model.name.clone());
            return Err(ServeError::Identity { head, member, trained_on, pool });
        }
    }
    Ok(())
}

/// Has the pools make an answer, and tells those who follow of its tokens. It goes on however slowly its client reads: the pools keep memory for it.
async fn make(
    mut events: BoxStream<'static, Result<GenerateEvent, ClientError>>,
    told: Vec<Sending>,
    carrying: impl Future<Output = Result<(), ClientError>>,
    out: UnboundedSender<Result<GenerateEvent, ClientError>>,
) {
    let mut carrying = pin!(carrying.fuse());
    loop {
        let event = tokio::select! {
            // What broke first is why the other breaks too.
            biased;
            Err(error) = &mut carrying => Err(error),
            event = events.next() => match event {
                Some(event) => event,
                None => return,
            },
        };
        if let Ok(GenerateEvent::Token(token)) = &event {
            let line = FollowTokens { tokens: vec![token.token] }.line();
            for pool in &told {
                // Of one that is gone no rows come either: that is where it is seen.
                let _ = pool.send(line.clone()).await;
            }
        }
        let over = event.is_err();
        if out.send(event).is_err() || over {
            return;
        }
    }
}

/// Sends the rows of all who follow, as soon as all have them, until the first pool takes no more.
async fn carry(mut following: Vec<Following>, rows: Sending, widths: Arc<[usize]>) -> Result<(), ClientError> {
    let mut held = vec![TapRows::default(); following.len()];
    loop {
        try_join_all(following.iter_mut().zip(&mut held).map(async |(following, held)| {
            while held.rows == 0 {
                *held = following.next().await?;
            }
            Ok(())
        }))
        .await?;
        let common = held.iter().map(|rows| rows.rows).min().unwrap_or(0);
        let joined = TapRows::join(held.iter_mut().map(|rows| rows.split_to(common)));
        if rows.send(joined.encode(&widths)).await.is_err() {
            // Its events say why.
            return Ok(());
        }
    }
}
