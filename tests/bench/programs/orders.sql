-- SQLite's share of the benchmark: inserts, indexes, joins, grouping, updates, text functions, on a database in memory.
PRAGMA temp_store = MEMORY;
CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, region INTEGER NOT NULL);
CREATE TABLE purchase (id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, item INTEGER NOT NULL, amount INTEGER NOT NULL, note TEXT);

BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000)
INSERT INTO customer SELECT i, printf('customer-%05d', i * 7919 % 2003), i * 31 % 17 FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
INSERT INTO purchase SELECT i, 1 + i * 104729 % 2000, i * 15485863 % 500, 1 + i * 32452843 % 997,
    substr('the quick brown fox jumps over the lazy dog', 1 + i % 20, 5 + i % 15) FROM n;
COMMIT;

CREATE INDEX purchase_customer ON purchase (customer, item);
CREATE INDEX purchase_item ON purchase (item);

SELECT region, count(*), sum(amount), max(note) FROM purchase JOIN customer ON customer.id = purchase.customer
    GROUP BY region ORDER BY region;
SELECT name, total FROM (SELECT customer, sum(amount) AS total FROM purchase GROUP BY customer) AS spent
    JOIN customer ON customer.id = spent.customer ORDER BY total DESC, name LIMIT 10;
SELECT count(*) FROM purchase AS a JOIN purchase AS b ON a.customer = b.customer AND a.item = b.item AND a.id < b.id;
SELECT count(*), sum(length(replace(note, 'o', '00'))) FROM purchase WHERE note LIKE '%fox%' OR upper(note) GLOB '*DOG';

BEGIN;
UPDATE purchase SET amount = amount * 2, note = note || '!' WHERE item % 5 = 2;
DELETE FROM purchase WHERE item BETWEEN 100 AND 150;
COMMIT;

SELECT count(*), sum(amount), sum(length(note)) FROM purchase;
WITH RECURSIVE collatz(start, n, steps) AS (
    SELECT id, id, 0 FROM customer WHERE id <= 300
    UNION ALL SELECT start, CASE n % 2 WHEN 0 THEN n / 2 ELSE 3 * n + 1 END, steps + 1 FROM collatz WHERE n > 1
) SELECT max(steps), sum(steps) FROM (SELECT start, max(steps) AS steps FROM collatz GROUP BY start);
PRAGMA integrity_check;
