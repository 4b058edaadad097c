"""What PostgreSQL's planner goes by: left by other tests, it makes plans that no service would have."""

# As of tables that are new: PostgreSQL may have looked at them by itself, while other tests had them full or empty.
# ANALYZE alone keeps what was known of a table that is empty now.
FORGET_STATISTICS = (
    "DELETE FROM pg_statistic WHERE starelid IN (SELECT relid FROM pg_stat_user_tables)",
    "UPDATE pg_class SET reltuples = -1, relpages = 0 WHERE oid IN (SELECT relid FROM pg_stat_user_tables)",
)
