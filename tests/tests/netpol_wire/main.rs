//! NetworkPolicy on simulated nodes: real agents, real packets, records of the CNI as containerd writes them.

mod audit;
mod bad_input;
mod command;
mod guard;
mod live;
mod prober;
mod provenance;
mod scenarios;
mod sctp;
mod spoof;
mod stage;
mod storm;
mod upgrade;
mod upstream;
