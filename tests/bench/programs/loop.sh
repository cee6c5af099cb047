# The shell's share of the benchmark: its own loops, arithmetic, patterns, strings and functions, and no other process.
gcd() {
    a=$1 b=$2
    while [ "$b" -ne 0 ]; do
        t=$((a % b)) a=$b b=$t
    done
}

i=0 sum=0 odd=0 text=
while [ $i -lt "$1" ]; do
    i=$((i + 1))
    sum=$(((sum * 31 + i) % 1000003))
    case $sum in
        *[13579]) odd=$((odd + 1)) ;;
        *00) text=${text#?????} ;;
        *) text=$text${sum%?}, ;;
    esac
    if [ ${#text} -gt 200 ]; then
        text=${text##*,9}
    fi
done
echo "$sum $odd ${#text}"

total=0
for x in 1071 46368 123456 987654; do
    for y in 462 28657 7890 3210 17711 10946; do
        gcd $x $y
        total=$((total + a))
    done
done
echo $total
