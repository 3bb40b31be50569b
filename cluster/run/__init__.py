"""What is a run? Its life from claim to result, and what it trains; not where its workers come from."""
