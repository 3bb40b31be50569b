"""What is a run? Its life from claim to end, and what it trains; not where its workers come from, or what it leaves."""
